"""The history of many clients, each of which asks one of two servers by chance, is explained by an order in time."""

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

import serving
from history import final_states
from serving import Running, settings
from soak import size
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.store.shared.address import BUCKET
from swaplora_server.http.app import create_app
from swaplora_server.http.transport.body_memory import BodyMemory
from swaplora_server.service.service import Service
from test_linearizable import NAMES, NEW, NUM_CLIENTS, Clients, InFlight, alone


class Either:
    """A client of several servers: each request goes to any of them."""

    def __init__(self, clients: list[httpx.AsyncClient], seed: int) -> None:
        self._clients = clients
        self._rng = random.Random(seed)

    def __getattr__(self, method: str) -> Any:
        return getattr(self._rng.choice(self._clients), method)


class All:
    """The count of requests in flight on all servers."""

    def __init__(self, apps: list[InFlight]) -> None:
        self._apps = apps

    @property
    def count(self) -> int:
        return sum(app.count for app in self._apps)


class ClientsOfBoth(Clients):
    """The same, whose requests go to either."""

    servers: list[Running]

    async def rest(self) -> None:
        for server in self.servers:
            self.server = server
            await super().rest()


@pytest.fixture
def both(
    base: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[list[Running], All]]:
    apps: list[InFlight] = []

    def counted(service: Service, bodies: BodyMemory) -> InFlight:
        apps.append(InFlight(create_app(service, bodies)))
        return apps[-1]

    monkeypatch.setattr(serving, "create_app", counted)
    with ExitStack() as stack:
        running = [
            stack.enter_context(
                serving.serving(settings(base, tmp_path / name, keep_versions=10_000, shared_store=address))
            )
            for name in ("one", "other")
        ]
        yield running, All(apps)


async def test_what_sixteen_clients_see_of_two_servers_is_explained_by_an_order_in_time(
    both: tuple[list[Running], All], address: str, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    servers, app = both
    monkeypatch.setattr("swaplora_server.service.service.SEEN_SECONDS", 60.0)  # a slow machine is no store that is away
    answers, files = {}, {}
    for folder in adapters[:6]:
        digest, answers[digest] = alone(servers[0], folder)
        files[digest] = {"config": (folder / CONFIG_FILE).read_bytes(), "weights": (folder / WEIGHTS_FILE).read_bytes()}
    states = {name: frozenset([NEW]) for name in NAMES}
    rngs = [random.Random(number) for number in range(NUM_CLIENTS)]
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=servers[0].url, timeout=60, limits=limits) as one,
        httpx.AsyncClient(base_url=servers[1].url, timeout=60, limits=limits) as other,
    ):
        clients = ClientsOfBoth(servers[0], app, files, answers, Either([one, other], 0))  # type: ignore[arg-type]
        clients.servers = servers
        began = time.monotonic()
        for _ in range(size(2, 20) if address.startswith(BUCKET) else size(5, 200)):
            for name, operations in (await clients.all_at_once(rngs)).items():
                states[name] = final_states(operations, states[name])
                assert states[name], f"no order explains {sorted(operations, key=lambda one: one.start)}"
    Console().print(
        f"\n{clients.num_heard} operations answered, {clients.num_unheard} given up midway, "
        f"{time.monotonic() - began:.1f} s"
    )
    assert clients.num_rolled > 1
    assert clients.num_unheard > 1
