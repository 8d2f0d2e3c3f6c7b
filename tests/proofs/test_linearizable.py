"""Sixteen clients upload, replace, roll back, delete and ask: some order in time explains all that they see."""

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import httpx
import pytest
from rich.console import Console
from starlette.types import ASGIApp, Receive, Scope, Send

import serving
from history import Operation, State, final_states
from serving import Running, settings
from soak import size
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_server.http.app import create_app
from swaplora_server.http.transport.body_memory import BodyMemory
from swaplora_server.service.service import Service

NAMES = ("one", "two", "three")
NUM_CLIENTS, ROUND = 16, 48
PROMPT = [97, 31, 200, 5, 66, 142]
MAX_TOKENS = 6
GUARD_SECONDS = 300
NEW = State()
Kind = Literal["put", "delete", "roll", "read"]
CHANGES: dict[str, Kind] = {"put": "put", "delete": "delete", "roll": "roll"}


class Drawn(NamedTuple):
    """What an operation is about: a name, what a put sends, the version that a roll back wants, and when it begins."""

    name: str
    digest: str
    wanted: int
    start: float


class InFlight:
    """The app, with a count of the requests that it has not finished with, their clients gone or not."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.count = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_request = scope["type"] == "http"  # and not the app's whole life
        self.count += is_request
        try:
            await self.app(scope, receive, send)
        finally:
            self.count -= is_request


@dataclass
class Clients:
    """What all clients share: the server, six adapters to upload and what each says alone, and all that was seen."""

    server: Running
    app: InFlight
    files: dict[str, dict[str, bytes]]  # by digest
    alone: dict[str, list[int]]
    http: httpx.AsyncClient
    seen: dict[str, list[Operation]] = field(default_factory=lambda: defaultdict(list))
    newest: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    num_heard: int = 0
    num_rolled: int = 0
    num_unheard: int = 0

    async def operate(self, rng: random.Random, count: int) -> None:
        """Some operations one after the other, one in ten given up midway."""
        operations = {
            self.put: 30,
            self.delete: 10,
            self.roll: 15,
            self.generate: 25,
            self.look: 12,
            self.look_at_all: 8,
        }
        for _ in range(count):
            [operation] = rng.choices(list(operations), list(operations.values()))
            name, digest = rng.choice(NAMES), rng.choice(sorted(self.files))
            drawn = Drawn(name, digest, max(1, self.newest[name] - rng.randrange(4)), time.monotonic())
            patience = rng.uniform(0, 0.04) if rng.random() < 0.1 else None
            try:
                async with asyncio.timeout(patience):
                    await operation(drawn)
                self.num_heard += 1
            except TimeoutError:
                self.num_unheard += 1
                kind = CHANGES.get(operation.__name__)
                if kind is not None:
                    times = drawn.start, float("inf")
                    given_up = Operation(kind, *times, drawn.digest, is_heard=False, wanted=drawn.wanted)
                    self.seen[name].append(given_up)

    async def put(self, drawn: Drawn) -> None:
        response = await self.http.put(f"/v1/adapters/{drawn.name}", files=self.files[drawn.digest])
        assert response.status_code in (200, 201), response.text
        assert response.json()["digest"] == drawn.digest
        self.newest[drawn.name] = response.json()["version"]
        self.saw("put", drawn, drawn.digest, response.json()["version"])

    async def delete(self, drawn: Drawn) -> None:
        response = await self.http.delete(f"/v1/adapters/{drawn.name}", params={"timeout": drawn.start % 1})
        version = response.json()["versions"][-1] if response.status_code in (200, 202) else None
        assert version is not None or response.json()["error"]["code"] == "adapter_not_found", response.text
        self.saw("delete", drawn, None, version)

    async def roll(self, drawn: Drawn) -> None:
        response = await self.http.patch(f"/v1/adapters/{drawn.name}", json={"current": drawn.wanted})
        version = response.json().get("version")
        code = response.json().get("error", {}).get("code")
        assert version is not None or code in ("adapter_not_found", "version_not_found"), response.text
        self.num_rolled += version is not None
        self.saw("roll", drawn, None, version)

    async def generate(self, drawn: Drawn) -> None:
        body = {"model": drawn.name, "prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0}
        response = await self.http.post("/v1/completions", json=body | {"return_token_ids": True})
        digest, version = None, None
        if response.status_code == 200:
            digest = response.headers["x-swaplora-digest"]
            version = int(response.headers["x-swaplora-adapter"].removeprefix(f"{drawn.name}@"))
            assert response.json()["choices"][0]["token_ids"] == self.alone[digest]
        else:
            assert response.json()["error"]["code"] == "model_not_found", response.text
        self.saw("read", drawn, digest, version)

    async def look(self, drawn: Drawn) -> None:
        card = (await self.http.get(f"/v1/adapters/{drawn.name}")).json()
        assert card.get("error", {"code": "adapter_not_found"})["code"] == "adapter_not_found"
        self.saw("read", drawn, card.get("digest"), card.get("version"))

    async def look_at_all(self, drawn: Drawn) -> None:
        cards = {card["name"]: card for card in (await self.http.get("/v1/adapters")).json()["data"]}
        for name in NAMES:
            card = cards.get(name, {})
            self.saw("read", drawn._replace(name=name), card.get("digest"), card.get("version"))

    def saw(self, kind: Kind, drawn: Drawn, digest: str | None, version: int | None) -> None:
        wanted = drawn.wanted if kind == "roll" else None
        operation = Operation(kind, drawn.start, time.monotonic(), digest, version, wanted=wanted)
        self.seen[drawn.name].append(operation)

    async def rest(self) -> None:
        """Wait until the server has finished with everything, also with what was given up."""
        for _ in range(2):
            async with httpx.AsyncClient(base_url=self.server.url) as fresh:  # stands in line behind all that came
                await fresh.get("/health")
        async with asyncio.timeout(GUARD_SECONDS):  # or what never ends would have this hang
            while self.app.count:
                await asyncio.sleep(0.005)

    async def all_at_once(self, rngs: list[random.Random]) -> dict[str, list[Operation]]:
        """Everyone at once; then, with the server at rest, a look at each name. All that was seen of each."""
        self.seen.clear()
        await asyncio.gather(*(self.operate(rng, ROUND // NUM_CLIENTS) for rng in rngs))
        await self.rest()
        end = time.monotonic()
        for name in NAMES:
            await self.look(Drawn(name, "", 0, time.monotonic()))
        return {
            name: [replace(one, end=min(one.end, end)) if not one.is_heard else one for one in self.seen[name]]
            for name in NAMES
        }


@pytest.fixture
def watched(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Running, InFlight]]:
    """A server that can be seen to be at rest."""
    apps: list[InFlight] = []

    def counted(service: Service, bodies: BodyMemory) -> InFlight:
        apps.append(InFlight(create_app(service, bodies)))
        return apps[-1]

    monkeypatch.setattr(serving, "create_app", counted)
    with serving.serving(settings(base, tmp_path / "data", keep_versions=10_000)) as running:
        yield running, apps[0]


def alone(server: Running, folder: Path) -> tuple[str, list[int]]:
    """What an adapter says when nobody else is there; it is gone afterwards."""
    digest = server.put("alone", folder).json()["digest"]
    said = server.token_ids("alone", PROMPT, MAX_TOKENS)
    server.client.delete("/v1/adapters/alone")
    return digest, said


async def test_what_sixteen_clients_see_of_three_names_is_explained_by_an_order_in_time(
    watched: tuple[Running, InFlight], adapters: list[Path]
) -> None:
    server, app = watched
    answers, files = {}, {}
    for folder in adapters[:6]:
        digest, answers[digest] = alone(server, folder)
        files[digest] = {"config": (folder / CONFIG_FILE).read_bytes(), "weights": (folder / WEIGHTS_FILE).read_bytes()}
    assert len(set(map(tuple, answers.values()))) == 6
    states = {name: frozenset([NEW]) for name in NAMES}
    rngs = [random.Random(number) for number in range(NUM_CLIENTS)]
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=None)) as http:
        clients = Clients(server, app, files, answers, http)
        for _ in range(size(400, 10_000) // ROUND + 1):
            for name, operations in (await clients.all_at_once(rngs)).items():
                states[name] = final_states(operations, states[name])
                assert states[name], f"no order explains {sorted(operations, key=lambda one: one.start)}"
    Console().print(f"\n{clients.num_heard} operations answered, {clients.num_unheard} given up midway")
    assert min(clients.num_unheard, clients.num_rolled) > 5


def read(start: float, end: float, digest: str | None, version: int | None) -> Operation:
    return Operation("read", start, end, digest, version)


def put(start: float, end: float, digest: str, version: int) -> Operation:
    return Operation("put", start, end, digest, version)


def delete(start: float, end: float, version: int | None) -> Operation:
    return Operation("delete", start, end, None, version)


def roll(start: float, end: float, wanted: int, version: int | None) -> Operation:
    return Operation("roll", start, end, None, version, wanted=wanted)


def after(*digests: str, current: int | None = None, gone: int = 0) -> State:
    """A name with these versions, the newest of them current, after `gone` others."""
    versions = tuple(enumerate(digests, start=gone + 1))
    newest = gone + len(digests)
    return State(versions, current or (newest if digests else None), newest)


UNHEARD = Operation("put", 2, 6, "b", is_heard=False)


@pytest.mark.parametrize(
    ("operations", "ends"),
    [
        pytest.param([], {NEW}, id="nothing"),
        pytest.param([put(0, 1, "a", 1), read(2, 3, "a", 1)], {after("a")}, id="a put is seen"),
        pytest.param([put(0, 1, "a", 1), put(2, 3, "a", 1)], {after("a")}, id="the same bytes are no new version"),
        pytest.param([put(0, 1, "a", 1), delete(2, 3, 1)], {after(gone=1)}, id="a delete"),
        pytest.param([delete(0, 1, None), read(2, 3, None, None)], {NEW}, id="nothing to delete"),
        pytest.param([put(0, 9, "a", 2), put(0, 9, "b", 1)], {after("b", "a")}, id="two puts at once, told apart"),
        pytest.param([put(0, 9, "a", 1), read(1, 2, None, None), read(3, 4, "a", 1)], {after("a")}, id="amid a put"),
        pytest.param([put(0, 1, "a", 1), UNHEARD], {after("a"), after("a", "b")}, id="unheard: perhaps"),
        pytest.param([put(0, 1, "a", 1), UNHEARD, read(3, 4, "b", 2)], {after("a", "b")}, id="unheard: seen"),
        pytest.param([put(0, 1, "a", 1), UNHEARD, read(7, 8, "a", 1)], {after("a")}, id="unheard: never"),
        pytest.param(
            [put(0, 1, "a", 1), put(2, 3, "b", 2), roll(4, 5, 1, 1), read(6, 7, "a", 1)],
            {after("a", "b", current=1)},
            id="a roll back",
        ),
        pytest.param([put(0, 1, "a", 1), roll(2, 3, 2, None)], {after("a")}, id="no such version to roll to"),
    ],
)
def test_the_checker_knows_how_a_history_may_end(operations: list[Operation], ends: set[State]) -> None:
    assert final_states(operations, [NEW]) == ends


@pytest.mark.parametrize(
    "operations",
    [
        pytest.param([put(0, 1, "a", 1), read(2, 3, None, None)], id="an acknowledged put is not seen"),
        pytest.param([put(0, 1, "a", 1), put(2, 3, "b", 2), read(4, 5, "a", 1)], id="old weights after a replace"),
        pytest.param([put(0, 1, "a", 1), read(2, 3, "b", 1)], id="another's weights"),
        pytest.param([put(0, 1, "a", 1), delete(2, 3, 1), read(4, 5, "a", 1)], id="seen after its delete"),
        pytest.param([put(0, 9, "a", 1), read(1, 2, "a", 1), read(3, 4, None, None)], id="seen, and then not"),
        pytest.param([put(0, 9, "a", 1), put(0, 9, "b", 1)], id="one version number twice"),
        pytest.param(
            [put(0, 1, "a", 1), put(2, 3, "b", 2), roll(4, 5, 1, 1), read(6, 7, "b", 2)], id="a roll back not seen"
        ),
        pytest.param([put(0, 1, "a", 1), delete(2, 3, 1), roll(4, 5, 1, 1)], id="rolled to what was deleted"),
        pytest.param([put(0, 1, "a", 1), delete(2, 3, 1), delete(4, 5, 1)], id="deleted twice"),
        pytest.param([put(0, 1, "a", 1), read(1.5, 1.8, "b", 2), UNHEARD], id="unheard: seen before it began"),
        pytest.param([put(0, 1, "a", 1), UNHEARD, read(7, 8, "a", 1), read(8.5, 9, "b", 2)], id="unheard: too late"),
    ],
)
def test_the_checker_finds_a_history_that_no_order_explains(operations: list[Operation]) -> None:
    assert not final_states(operations, [NEW])
