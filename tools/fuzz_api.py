"""`make fuzz`: requests that the OpenAPI document gives rise to, or forbids, their answers checked by schemathesis.

For each operation the edges of everything that it takes, one at a time, and then cases drawn at random, half of them
with a request that the document forbids. Every check of schemathesis is held but those in `NOT_HELD`.
"""

import argparse
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import requests
import schemathesis
import structlog
from hypothesis import HealthCheck, Phase, given
from hypothesis import seed as seeded
from hypothesis import settings as examples
from rich.console import Console
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import CHECKS
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok

import tiny
from serving import Running, serving, settings
from swaplora_server.config import Settings

KEY = "secret"
STORED, ALIAS = "tuned", "prod"
NOT_HELD = {
    # bodies have rules between fields, and names, token ids, grammars and templates have their own: all are refused by
    # 400 and told, and none can be written into a JSON schema
    "positive_data_acceptance",
    # of sequences of requests, which tests/registry and tests/proofs have
    "use_after_free",
    "ensure_resource_availability",
    "object_level_authorization",
}
SOUND: Mapping[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    **dict.fromkeys(("prompt", "input", "query", "text_1", "text_2"), "hi"),
}
FEW_TOKENS, CONTEXT = 3, 96
ROUND = 12  # cases drawn of one operation before the next one has its turn
Operation = APIOperation[Any, Any, Any, Any]


@dataclass
class Findings:
    """What was sent, and what was wrong with the answers: of each kind how often, and the first one's words."""

    num_cases: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    told: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, told: str) -> None:
        self.wrong[kind] += 1
        self.told.setdefault(kind, told)

    def __str__(self) -> str:
        """In words, for whoever mends it."""
        return "\n\n".join(f"{self.wrong[kind]} x {kind}\n{told}" for kind, told in self.told.items())


class Fuzzer:
    """Sends cases to one server, which has one adapter and one alias, as far as these left them there."""

    def __init__(self, server: Running, adapter: Path) -> None:
        server.client.headers["Authorization"] = f"Bearer {KEY}"
        self._server = server
        self._adapter = adapter
        self._session = requests.Session()
        self._api = schemathesis.openapi.from_dict(server.client.get("/openapi.json").json())
        self._api.config.checks.negative_data_rejection.expected_statuses.append("413")  # a long list may be too long
        self._checks = held_checks()
        self.operations: list[Operation] = [
            found.ok() for found in self._api.get_all_operations() if isinstance(found, Ok)
        ]
        self.findings = Findings()

    def cover(self, num_cases: int) -> None:
        """At most so many of each operation's edges, none of which is drawn."""
        modes = list(GenerationMode)
        for operation in self.operations:
            self._store()
            config = self._api.config.generation_for(operation=operation)
            cases = self._api.iter_coverage_cases(operation, generation_modes=modes, generation_config=config)
            for number, case in enumerate(islice(cases, num_cases)):
                self._send(case, turn=number)

    def draw(self, num_cases: int, seed: int) -> None:
        """Cases of every operation in turn, until so many have been sent in all."""
        for turn in count():
            for operation, mode in self._sorts():
                if self.findings.num_cases >= num_cases:
                    return
                self._store()
                self._draw(operation, mode, min(ROUND, num_cases - self.findings.num_cases), seed + turn)

    def _sorts(self) -> Iterator[tuple[Operation, GenerationMode]]:
        """Nothing is wrong for an operation that takes nothing, and any text is a path's parameter."""
        for operation in self.operations:
            yield operation, GenerationMode.POSITIVE
            if operation.query or operation.body:
                yield operation, GenerationMode.NEGATIVE

    def _draw(self, operation: Operation, mode: GenerationMode, num_cases: int, seed: int) -> None:
        turns = count()

        @seeded(seed)
        @given(case=operation.as_strategy(mode))
        @examples(
            max_examples=num_cases,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def send(case: Case[Any]) -> None:
            self._send(case, turn=next(turns))

        send()

    def _send(self, case: Case[Any], turn: int) -> None:
        """Of three cases two name what is there, and one of these has something sound to answer, if it may be sound."""
        if turn % 3:
            bring_further(case, is_sound=turn % 3 == 2)
        shorten(case)
        (case.query or {}).pop("intruders", None)  # each count starts a process; test_inspection does
        headers = {"Authorization": f"Bearer {KEY}"}
        self.findings.num_cases += 1
        try:
            answer = case.call(self._server.url, self._session, headers, timeout=120)
            self.findings.statuses[answer.status_code] += 1
            case.validate_response(
                answer,
                self._checks,
                headers=headers,
                transport_kwargs={"base_url": self._server.url, "session": self._session, "headers": headers},
            )
        except FailureGroup as failures:
            for failure in failures.exceptions:
                self.findings.add(f"{case.operation.label}: {type(failure).__name__}", str(failures))

    def _store(self) -> None:
        self._server.put(STORED, self._adapter)
        self._server.client.put(f"/v1/aliases/{ALIAS}", json={"target": STORED})


def fuzzed(base: Path, data_dir: Path) -> Settings:
    """Of a server to fuzz: it asks for a key, and no answer is long."""
    return settings(base, data_dir, api_key=(KEY,), max_model_len=CONTEXT)


def held_checks() -> list[Any]:
    """Raises KeyError for one in `NOT_HELD` that schemathesis does not know."""
    schemathesis.checks.load_all_checks()
    names = set(CHECKS.get_all_names())
    if unknown := NOT_HELD - names:
        raise KeyError(unknown)
    return [CHECKS.get_one(name) for name in sorted(names - NOT_HELD)]


def bring_further(case: Case[Any], *, is_sound: bool) -> None:
    """Name the adapter and the alias where a case has names, and give short things to answer where it `is_sound`."""
    if case.path_parameters:
        case.path_parameters = {key: ALIAS if key == "alias" else STORED for key in case.path_parameters}
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        sound = {name: value for name, value in SOUND.items() if is_sound and name in case.body}
        case.body = {**case.body, **sound, "model": STORED}


def shorten(case: Case[Any]) -> None:
    """Keep answers to a few tokens where nothing says how many."""
    is_allowed = case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE
    field = "max_output_tokens" if case.path == "/v1/responses" else "max_tokens"
    if is_allowed and isinstance(case.body, dict) and case.body.get("model") and case.body.get(field) is None:
        case.body = {**case.body, field: FEW_TOKENS}


def main() -> int:
    """How many kinds of things were wrong, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=2000, help="how many")
    parser.add_argument("--edges", type=int, default=sys.maxsize, help="of them at most so many edges an operation")
    parser.add_argument("--seed", type=int, default=0, help="of those that are drawn")
    options = parser.parse_args()
    console = Console(soft_wrap=True, highlight=False)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with tempfile.TemporaryDirectory() as folder:
        base = tiny.save_tiny_base(Path(folder) / "base")
        adapter = tiny.save_adapter(Path(folder) / STORED, base, seed=1, rank=8)
        with serving(fuzzed(base, Path(folder) / "data")) as server:
            fuzzer = Fuzzer(server, adapter)
            fuzzer.cover(options.edges)
            fuzzer.draw(options.cases, options.seed)
    found = fuzzer.findings
    console.print(f"{found.num_cases} cases, seed {options.seed}: {dict(sorted(found.statuses.items()))}\n{found}")
    return int(bool(found.wrong))


if __name__ == "__main__":
    sys.exit(main())
