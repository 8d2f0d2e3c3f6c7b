"""Answers of all replicas as one: lists together, metrics side by side, and of what one alone has its answer."""

import re
from collections.abc import Callable, Iterable

from pydantic import TypeAdapter
from pydantic_core import from_json, to_json
from starlette.datastructures import QueryParams
from starlette.types import Scope

from swaplora_server.cluster.exchange import Answer
from swaplora_server.http.errors import error_body

Gathered = Callable[[list[Answer], Scope], Answer]
ALL_OF_A_LIST = b"limit=1000"  # as many as one asks for at most
_DEFAULT_LIMIT = 100
_NUMBER = TypeAdapter(int)  # as a replica reads it
_BY_ID = re.compile(r"/v1/evaluations/[^/]+(/cancel)?")
_EOF = b"# EOF\n"  # of OpenMetrics
_FAMILY = re.compile(rb"(?P<name>\S+).*\n(?:#.*\n)*")  # behind `# HELP `
_BRACED = re.compile(rb"^[A-Za-z_:][\w:]*\{", re.MULTILINE)  # the beginnings of samples, with and without labels
_BARE = re.compile(rb"^[A-Za-z_:][\w:]*(?= )", re.MULTILINE)
READY = frozenset({"/health/ready", "/ping"})  # a server that ends is not
HEALTH = READY | {"/health"}


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


def missing() -> Answer:
    """That of a replica which gives none in time: what it has is not to be taken for what is not there."""
    told = error_body("not_ready", "a replica did not answer in time; try again in 1 s")
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
    body = to_json(told)
    return Answer("", 503, [*headers, (b"content-length", str(len(body)).encode())], body)


def best(answers: Iterable[Answer]) -> Answer | None:
    """The first of those that say least against it: what is not found comes last, then what failed."""
    return min(answers, key=lambda answer: (answer.status == 404, answer.status), default=None)


def _best(answers: list[Answer], _scope: Scope) -> Answer:
    return min(answers, key=lambda answer: (answer.status == 404, answer.status))


def is_page(answers: list[Answer], scope: Scope, how: Gathered) -> bool:
    """Whether these are parts of lists, and what is asked for is found in the lists of all, each whole."""
    good = [answer for answer in answers if answer.status == 200]
    if how is not _lists or not good or _refusal(answers) is not None:
        return False
    asked = QueryParams(scope["query_string"])
    return "limit" in asked or "after" in asked or any(from_json(answer.body)["has_more"] for answer in good)


def _refusal(answers: list[Answer]) -> Answer | None:
    """Of a replica without which a list would be short, and not say so: a 404 says that a page begins elsewhere."""
    refusals = [answer for answer in answers if answer.status not in (200, 404)]
    return max(refusals, key=lambda answer: answer.status, default=None)


def _lists(answers: list[Answer], scope: Scope) -> Answer:
    """Of evaluations, the newest of all first."""
    good = [answer for answer in answers if answer.status == 200]
    if (refusal := _refusal(answers)) is not None or not good:
        return refusal or _best(answers, scope)
    lists = [from_json(answer.body) for answer in good]
    data = sorted((one for each in lists for one in each["data"]), key=lambda one: one["created"], reverse=True)
    asked = QueryParams(scope["query_string"])
    places = [place for place, one in enumerate(data, start=1) if one["id"] == asked.get("after")]
    begin, limit = places[0] if places else 0, _NUMBER.validate_python(asked.get("limit", _DEFAULT_LIMIT))
    has_more = begin + limit < len(data) or any(each["has_more"] for each in lists)
    whole = {**lists[0], "data": data[begin : begin + limit], "has_more": has_more}
    return _with_body(good[0], to_json(whole), b"application/json")


def _metrics(answers: list[Answer], scope: Scope) -> Answer:
    """Every replica's that answers, as each has labelled them; a sum is PromQL's `sum without (replica)`."""
    good = [answer for answer in answers if answer.status == 200]
    limited = [answer for answer in answers if answer.status == 429]
    if limited or not good:
        return _best(limited or answers, scope)
    families: dict[bytes, list[bytes]] = {}  # by name: what is said of it, and the samples of each replica
    for answer in good:
        for told in answer.body.removesuffix(_EOF).strip(b"\n").removeprefix(b"# HELP ").split(b"\n# HELP "):
            if (match := _FAMILY.match(told + b"\n")) is not None:
                families.setdefault(match["name"], [b"# HELP " + match[0]]).append(told[match.end() :] + b"\n")
    parts = [part for each in families.values() for part in each if part.strip()]
    is_openmetrics = good[0].body.endswith(_EOF)
    return _with_body(good[0], b"".join([*parts, _EOF * is_openmetrics]), _media_type(good[0]))


def labelled(answer: Answer) -> Answer:
    """Metrics with a label in each sample that says whose they are; anything else as it is.

    Each replica does this for itself: a front that did it for all would do nothing else meanwhile.
    """
    if not _media_type(answer).startswith((b"text/plain; version=", b"application/openmetrics-text")):
        return answer
    label = f'replica="{answer.replica}"'.encode()
    braced = _BRACED.sub(rb"\g<0>" + label + b",", answer.body)
    return answer._replace(body=_BARE.sub(rb"\g<0>{" + label + b"}", braced))


def _media_type(answer: Answer) -> bytes:
    return dict(answer.headers).get(b"content-type", b"")


def _with_body(answer: Answer, body: bytes, media_type: bytes) -> Answer:
    own = {b"content-length": str(len(body)).encode(), b"content-type": media_type}
    headers = [(name, own.get(name.lower(), value)) for name, value in answer.headers]
    return answer._replace(headers=headers, body=body)
