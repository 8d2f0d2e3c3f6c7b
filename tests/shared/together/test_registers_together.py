"""Aliases, mixtures, pins, gates, quotas and keys of two servers: some order in time explains what many clients see."""

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx
import pytest
import yaml

import serving
from history import final_states
from registers import NOTHING, Access, Take
from serving import settings
from soak import size
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_server.access.caller import KeyScope
from swaplora_server.access.key_file import create_key, read_keys
from swaplora_server.http.app import create_app
from swaplora_server.http.transport.body_memory import BodyMemory
from swaplora_server.service.service import Service
from test_linearizable import InFlight

NUM_CLIENTS, NUM_ROUNDS, NUM_EACH = 8, size(4, 200), 5
ROOM = 3
MEMBERS = ("f0", "f1", "f2", "f3")
Client = httpx.AsyncClient


@dataclass(frozen=True)
class Both:
    """Two servers: where they are, what is in flight there, and an administrator's key and a tenant's with a quota."""

    urls: list[str]
    apps: list[InFlight]
    key_file: Path
    admin: str
    acme: str

    @asynccontextmanager
    async def clients(self, key: str) -> AsyncIterator[list[Client]]:
        """One of each."""
        headers, limits = {"authorization": f"Bearer {key}"}, httpx.Limits(max_connections=None)
        async with AsyncExitStack() as stack:
            made = [Client(base_url=url, headers=headers, timeout=60, limits=limits) for url in self.urls]
            yield [await stack.enter_async_context(each) for each in made]

    async def rest(self) -> None:
        """Until both have finished with everything, also with what was given up."""
        for url in self.urls * 2:
            async with Client(base_url=url) as fresh:  # stands in line behind all that came
                await fresh.get("/health")
        while any(app.count for app in self.apps):
            await asyncio.sleep(0.005)


@pytest.fixture(scope="module")
def both(base: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    folder, apps = tmp_path_factory.mktemp("together"), list[InFlight]()
    (folder / "shared").mkdir()
    key_file = folder / "keys.yaml"
    admin, _ = create_key(key_file, "default", (KeyScope.ADMIN,), None)
    acme, _ = create_key(key_file, "acme", (KeyScope.READ, KeyScope.WRITE), None)
    content = yaml.safe_load(key_file.read_text()) | {"tenants": {"acme": {"adapters": ROOM}}}
    key_file.write_text(yaml.safe_dump(content))

    def counted(service: Service, bodies: BodyMemory) -> InFlight:
        apps.append(InFlight(create_app(service, bodies)))
        return apps[-1]

    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(serving, "create_app", counted)
        # a slow machine is no store that is away
        patch.setattr("swaplora_server.service.service.SEEN_SECONDS", 60.0)
        own = {"shared_store": str(folder / "shared"), "key_file": key_file}
        urls = [
            stack.enter_context(serving.serving(settings(base, folder / name, **own))).url for name in ("one", "other")
        ]
        for name, adapter in zip(MEMBERS, adapters, strict=False):
            headers = {"authorization": f"Bearer {admin}"}
            answer = httpx.put(f"{urls[0]}/v1/adapters/{name}", files=files_of(adapter), headers=headers, timeout=60)
            assert answer.status_code == 201
        yield Both(urls, apps, key_file, admin, acme)


def files_of(adapter: Path) -> dict[str, bytes]:
    return {"config": (adapter / CONFIG_FILE).read_bytes(), "weights": (adapter / WEIGHTS_FILE).read_bytes()}


class Register(NamedTuple):
    """How a thing with one value is written, removed, if it can be, and read; `name` is a thing's."""

    names: tuple[str, ...]
    values: tuple[str, ...]
    write: Callable[[Client, str, str], Awaitable[httpx.Response]]
    remove: Callable[[Client, str], Awaitable[httpx.Response]] | None
    read: Callable[[Client, str], Awaitable[str]]
    initial: str = NOTHING


async def asked(client: Client, name: str) -> str:
    """Who answers by this name; of a mixture the last member."""
    body = {"model": name, "prompt": [97, 31, 200], "max_tokens": 1, "temperature": 0}
    response = await client.post("/v1/completions", json=body)
    if response.status_code == 200:
        return response.headers["x-swaplora-adapter"].split(", ")[-1].removesuffix("@1")
    assert response.json()["error"]["code"] == "model_not_found", response.text
    return NOTHING


async def alias_target(client: Client, alias: str) -> str:
    response = await client.get(f"/v1/aliases/{alias}")
    return response.json()["targets"][0]["target"] if response.status_code == 200 else NOTHING


async def is_pinned(client: Client, name: str) -> str:
    return str((await client.get(f"/v1/adapters/{name}")).json()["pinned"])


async def least_score(client: Client, name: str) -> str:
    response = await client.get(f"/v1/adapters/{name}/gate")
    return str(response.json()["min_score"]) if response.status_code == 200 else NOTHING


def gate(score: str) -> dict[str, Any]:
    return {"task": [{"prompt": "a", "answer": "b"}], "min_score": float(score), "max_tokens": 1}


def put_alias(client: Client, name: str, value: str) -> Awaitable[httpx.Response]:
    return client.put(f"/v1/aliases/{name}", json={"target": value})


REGISTERS: Mapping[str, Register] = {
    "aliases": Register(
        ("x", "y"), MEMBERS, put_alias, lambda client, name: client.delete(f"/v1/aliases/{name}"), alias_target
    ),
    "aliases that are asked": Register(
        ("z",), MEMBERS, put_alias, lambda client, name: client.delete(f"/v1/aliases/{name}"), asked
    ),
    "mixtures": Register(
        ("m",),
        MEMBERS[1:],
        lambda client, name, value: client.post(
            "/v1/mixtures", json={"name": name, "members": [MEMBERS[0], value], "top_k": 1}
        ),
        lambda client, name: client.delete(f"/v1/mixtures/{name}"),
        asked,
    ),
    "pins": Register(
        MEMBERS[:2],
        ("True", "False"),
        lambda client, name, value: client.patch(f"/v1/adapters/{name}", json={"pinned": value == "True"}),
        None,
        is_pinned,
        "False",
    ),
    "gates": Register(
        MEMBERS[2:],
        ("0.25", "0.5", "0.75"),
        lambda client, name, value: client.put(f"/v1/adapters/{name}/gate", json=gate(value)),
        lambda client, name: client.delete(f"/v1/adapters/{name}/gate"),
        least_score,
    ),
}


@dataclass
class Clients:
    """All that was seen of the things of one kind."""

    of: Register
    servers: list[Client]
    seen: dict[str, list[Access]] = field(default_factory=lambda: defaultdict(list))

    async def operate(self, rng: random.Random) -> None:
        for _ in range(NUM_EACH):
            kind: Literal["write", "remove", "read"] = rng.choice(["write", "write", "remove", "read", "read"])
            if kind == "remove" and self.of.remove is None:
                kind = "read"
            name, value = rng.choice(self.of.names), rng.choice(self.of.values)
            given_up = Access(kind, time.monotonic(), float("inf"), value, is_heard=False)
            try:
                async with asyncio.timeout(rng.uniform(0, 0.04) if rng.random() < 0.1 else None):
                    told = await self.does(kind, rng.choice(self.servers), name, value)
                self.seen[name].append(replace(given_up, end=time.monotonic(), value=told, is_heard=True))
            except TimeoutError:
                self.seen[name].append(given_up)

    async def does(self, kind: str, client: Client, name: str, value: str) -> str:
        if kind == "read":
            return await self.of.read(client, name)
        if kind == "write":
            response = await self.of.write(client, name, value)
            assert response.is_success, response.text
            return value
        assert self.of.remove is not None
        response = await self.of.remove(client, name)
        assert response.status_code in (200, 404), response.text
        return "something" if response.is_success else NOTHING


@pytest.mark.parametrize("kind", REGISTERS)
async def test_what_many_clients_see_of_two_servers_is_explained_by_an_order_in_time(both: Both, kind: str) -> None:
    of = REGISTERS[kind]
    async with both.clients(both.admin) as servers:
        clients = Clients(of, servers)
        states = {name: frozenset([of.initial]) for name in of.names}
        rngs = [random.Random(number) for number in range(NUM_CLIENTS)]
        for _ in range(NUM_ROUNDS):
            clients.seen.clear()
            await asyncio.gather(*(clients.operate(rng) for rng in rngs))
            await both.rest()
            end = time.monotonic()
            for name in of.names:
                operations = [replace(one, end=min(one.end, end)) for one in clients.seen[name]]
                for server in servers:
                    begun = time.monotonic()
                    operations.append(Access("read", begun, float("inf"), await of.read(server, name)))
                states[name] = final_states(operations, states[name])
                assert states[name], f"no order explains {sorted(operations, key=lambda one: one.start)}"


async def test_two_servers_keep_to_the_quota_of_a_tenant_as_one_would(both: Both, adapters: list[Path]) -> None:
    files = files_of(adapters[0])
    async with both.clients(both.acme) as servers:
        names = [f"q{number}" for number in range(ROOM + 3)]
        states = frozenset([frozenset[str]()])
        counts = dict.fromkeys(("put", "delete", "refused"), 0)
        rngs = [random.Random(number) for number in range(NUM_CLIENTS)]
        for _ in range(NUM_ROUNDS):
            seen: list[Take] = []

            async def operate(rng: random.Random, seen: list[Take] = seen) -> None:
                for _ in range(NUM_EACH):
                    kind = rng.choice(["put", "put", "delete", "list"])
                    name, client, start = rng.choice(names), rng.choice(servers), time.monotonic()
                    seen.append(await take(client, kind, name, files, start))

            await asyncio.gather(*(operate(rng) for rng in rngs))
            states = final_states(seen, states)
            assert states, f"no order explains {sorted(seen, key=lambda one: one.start)}"
            for one in seen:
                if one.kind != "list":
                    counts[one.kind if one.was_done else "refused"] += 1
        assert min(counts.values()) > NUM_ROUNDS


async def take(client: Client, kind: str, name: str, files: dict[str, bytes], start: float) -> Take:
    if kind == "list":
        cards = (await client.get("/v1/adapters")).json()["data"]
        return Take("list", start, time.monotonic(), ROOM, frozenset(card["name"] for card in cards))
    if kind == "put":
        response = await client.put(f"/v1/adapters/{name}", files=files)
        assert response.is_success or response.json()["error"]["code"] == "quota_exceeded", response.text
        return Take("put", start, time.monotonic(), ROOM, frozenset([name]), response.is_success)
    response = await client.delete(f"/v1/adapters/{name}")
    assert response.is_success or response.json()["error"]["code"] == "adapter_not_found", response.text
    return Take("delete", start, time.monotonic(), ROOM, frozenset([name]), response.is_success)


async def test_keys_that_two_servers_make_and_revoke_at_once_hold_at_both_a_moment_later(both: Both) -> None:
    """Both with one file: at once where it was done, and once the other has looked at the file."""
    async with both.clients(both.admin) as servers:
        before = {key.id for key in read_keys(both.key_file).keys}

        async def make(number: int) -> tuple[str, str]:
            body = {"tenant": "acme", "scopes": ["adapters:read"], "days": 1}
            made = await servers[number % 2].post("/v1/keys", json=body)
            assert made.status_code == 201, made.text
            key = {"authorization": f"Bearer {made.json()['key']}"}
            assert (await servers[number % 2].get("/v1/adapters", headers=key)).status_code == 200
            return made.json()["id"], made.json()["key"]

        async def until(key: str, status: int) -> None:
            for client in servers:
                headers = {"authorization": f"Bearer {key}"}
                while (await client.get("/v1/adapters", headers=headers)).status_code != status:
                    await asyncio.sleep(0.05)
                assert (await client.get("/v1/adapters", headers=headers)).status_code == status

        made = await asyncio.gather(*(make(number) for number in range(12)))
        assert {key.id for key in read_keys(both.key_file).keys} == before | {key_id for key_id, _ in made}
        await asyncio.gather(*(until(key, 200) for _, key in made))
        revoked = [servers[number % 2].delete(f"/v1/keys/{key_id}") for number, (key_id, _) in enumerate(made)]
        assert {answer.status_code for answer in await asyncio.gather(*revoked)} == {200}
        assert {key.id for key in read_keys(both.key_file).keys} == before
        await asyncio.gather(*(until(key, 401) for _, key in made))
