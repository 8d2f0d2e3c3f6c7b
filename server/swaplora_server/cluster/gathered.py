"""Answers of all replicas as one: lists together, metrics side by side, and of what one alone has its answer."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import cast

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from pydantic_core import from_json, to_json
from starlette.datastructures import Headers, QueryParams
from starlette.types import Scope

from swaplora_server.cluster.exchange import Answer

Gathered = Callable[[list[Answer], Scope], Answer]
ALL_OF_A_LIST = b"limit=1000"  # as many as one asks for at most
_DEFAULT_LIMIT = 100
_BY_ID = re.compile(r"/v1/evaluations/[^/]+(/cancel)?")
HEALTH = frozenset({"/health", "/health/ready", "/ping"})


def gathered_as(method: str, path: str) -> Gathered | None:
    """How the answers of all to such a request become one; None for what one replica answers."""
    if _BY_ID.fullmatch(path):
        return _best
    if method not in ("GET", "HEAD"):
        return None
    if path in HEALTH:
        return _best
    return {"/v1/evaluations": _lists, "/metrics": _metrics}.get(path)


def is_of_one(how: Gathered) -> bool:
    """Whether one good answer is enough, whatever the others say."""
    return how is _best


def best(answers: Iterable[Answer]) -> Answer | None:
    """The first of those that say least against it: what is not found comes last, then what failed."""
    return min(answers, key=lambda answer: (answer.status == 404, answer.status), default=None)


def _best(answers: list[Answer], _scope: Scope) -> Answer:
    return min(answers, key=lambda answer: (answer.status == 404, answer.status))


def is_page(scope: Scope, how: Gathered) -> bool:
    """Whether a part of a list is asked for, which is found in the lists of all, each whole."""
    return how is _lists


def _lists(answers: list[Answer], scope: Scope) -> Answer:
    """Of evaluations, the newest of all first."""
    good = [answer for answer in answers if answer.status == 200]
    if not good:
        return _best(answers, scope)
    lists = [from_json(answer.body) for answer in good]
    data = sorted((one for each in lists for one in each["data"]), key=lambda one: one["created"], reverse=True)
    asked = QueryParams(scope["query_string"])
    places = [place for place, one in enumerate(data, start=1) if one["id"] == asked.get("after")]
    begin, limit = places[0] if places else 0, int(asked.get("limit", _DEFAULT_LIMIT))
    has_more = begin + limit < len(data) or any(each["has_more"] for each in lists)
    whole = {**lists[0], "data": data[begin : begin + limit], "has_more": has_more}
    return _with_body(good[0], to_json(whole), b"application/json")


def _metrics(answers: list[Answer], scope: Scope) -> Answer:
    """Every replica's, each with its label; a sum is PromQL's `sum without (replica)`."""
    good = [answer for answer in answers if answer.status == 200]
    if not good:
        return _best(answers, scope)
    registry = CollectorRegistry()
    registry.register(_Labelled(good))
    encode, media_type = choose_encoder(Headers(scope=scope).get("accept", ""))
    return _with_body(good[0], encode(registry), media_type.encode())


class _Labelled(Collector):
    def __init__(self, answers: list[Answer]) -> None:
        self._answers = answers

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for answer in self._answers:
            for family in _families(answer):
                whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    labels = {**sample.labels, "replica": answer.replica}
                    whole.samples.append(sample._replace(labels=labels))
        yield from families.values()


def _families(answer: Answer) -> Iterable[Metric]:
    """Which of both formats it is in, the replica chose by the same header as it is chosen here."""
    is_openmetrics = dict(answer.headers).get(b"content-type", b"").startswith(b"application/openmetrics-text")
    parse = openmetrics_families if is_openmetrics else text_string_to_metric_families
    return cast("Iterable[Metric]", parse(answer.body.decode()))


def _with_body(answer: Answer, body: bytes, media_type: bytes) -> Answer:
    own = {b"content-length": str(len(body)).encode(), b"content-type": media_type}
    headers = [(name, own.get(name.lower(), value)) for name, value in answer.headers]
    return answer._replace(headers=headers, body=body)
