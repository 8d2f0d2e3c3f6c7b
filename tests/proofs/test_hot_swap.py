"""Replace and delete while streams run: running ones end on what they were admitted with, new ones get what is new."""

import asyncio
from pathlib import Path

import httpx
import pytest

import tiny
from oracle import Oracle
from serving import BASE, Running, Streamed, stream_chat
from swaplora_server.engine.request import AdapterUse
from swaplora_server.engine.step import AdapterMismatchError, checked_weights

TOLERANCE = 1e-4
PROMPT: list[int] = tiny.byte_tokenizer().encode("<user>hello\n<assistant>", add_special_tokens=False)


@pytest.fixture
def versions(base: Path, tmp_path: Path) -> list[Path]:
    """Two adapters of different rank and targets, to be versions of one name."""
    old = tiny.save_adapter(tmp_path / "old", base, seed=1, rank=8)
    new = tiny.save_adapter(tmp_path / "new", base, seed=2, rank=4, alpha=32, target_modules=["q_proj"])
    return [old, new]


async def stream(server: Running, model: str, max_tokens: int) -> Streamed:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        return await stream_chat(client, model, "hello", max_tokens, ignore_eos=True)


async def wait_running(server: Running, count: int) -> None:
    async with asyncio.timeout(60):
        while server.service.engine.snapshot().num_running < count:
            await asyncio.sleep(0.005)


async def test_a_replace_amid_eight_streams_reaches_new_requests_only(
    server: Running, base: Path, versions: list[Path]
) -> None:
    old, new = versions
    server.put("swapped", old)
    running = [asyncio.create_task(stream(server, "swapped", 200)) for _ in range(8)]
    await wait_running(server, 8)
    replaced = await asyncio.to_thread(server.put, "swapped", new)
    after = await stream(server, "swapped", 20)
    assert not any(task.done() for task in running)
    before = await asyncio.gather(*running)
    assert (replaced.status_code, replaced.json()["version"]) == (200, 2)

    oracles = {"swapped@1": Oracle(base, old), "swapped@2": Oracle(base, new)}
    for said, name in [*((said, "swapped@1") for said in before), (after, "swapped@2")]:
        assert said.headers["x-swaplora-adapter"] == name
        assert oracles[name].worst_error(PROMPT, said.token_ids, said.logprobs) <= TOLERANCE
    assert oracles["swapped@1"].worst_error(PROMPT, after.token_ids, after.logprobs) > TOLERANCE
    assert after.headers["x-swaplora-digest"] == replaced.json()["digest"] != before[0].headers["x-swaplora-digest"]


async def test_a_deleted_adapter_ends_its_streams_whole_and_is_unknown_at_once(
    server: Running, base: Path, versions: list[Path]
) -> None:
    server.put("doomed", versions[0])
    running = asyncio.create_task(stream(server, "doomed", 300))
    await wait_running(server, 1)
    deleting = asyncio.create_task(asyncio.to_thread(server.client.delete, "/v1/adapters/doomed"))
    while server.generate("doomed", PROMPT).status_code != 404:
        await asyncio.sleep(0)
    assert not running.done()
    said = await running
    assert (await deleting).json()["state"] == "deleted"
    assert len(said.token_ids) == 300
    assert Oracle(base, versions[0]).worst_error(PROMPT, said.token_ids, said.logprobs) <= TOLERANCE


async def test_a_delete_that_does_not_wait_says_that_the_adapter_drains(
    server: Running, base: Path, tmp_path: Path
) -> None:
    server.put("slow", tiny.save_adapter(tmp_path / "slow", base, seed=77))  # bytes that no other name has
    running = asyncio.create_task(stream(server, "slow", 300))
    await wait_running(server, 1)
    answer = await asyncio.to_thread(server.client.delete, "/v1/adapters/slow?timeout=0")
    assert (answer.status_code, answer.json()["state"]) == (202, "draining")
    await running
    server.wait_idle()
    assert server.client.get("/v1/adapters/slow").status_code == 404


async def test_a_delete_does_not_wait_for_another_name_with_the_same_bytes(
    server: Running, versions: list[Path]
) -> None:
    server.put("busy", versions[0])
    server.put("twin", versions[0])
    running = asyncio.create_task(stream(server, "busy", 300))
    await wait_running(server, 1)
    answer = await asyncio.to_thread(server.client.delete, "/v1/adapters/twin?timeout=5")
    assert (answer.json()["state"], running.done()) == ("deleted", False)
    await running


def test_fifty_replaces_leave_every_version_answering_as_itself(
    server: Running, base: Path, versions: list[Path]
) -> None:
    expected = [server.put("solo", folder) and server.token_ids("solo", PROMPT) for folder in versions]
    assert expected[0] != expected[1]
    for turn in range(50):
        answer = server.put("turns", versions[turn % 2])
        assert answer.json()["version"] == turn + 1
        assert server.token_ids("turns", PROMPT) == expected[turn % 2]
    kept = [version["version"] for version in server.client.get("/v1/adapters/turns").json()["versions"]]
    assert kept == list(range(43, 51))


def test_a_name_that_contains_another_is_left_alone(server: Running, base: Path, versions: list[Path]) -> None:
    names = ["a", "aa", "lora", "default", "foo", "foobar", "foo.bar", "base_model"]
    for name in names:
        server.put(name, versions[0])
    digests = {name: server.client.get(f"/v1/adapters/{name}").json()["digest"] for name in names}
    server.put("foo", versions[1])
    server.client.delete("/v1/adapters/a")
    for name in names[1:]:
        assert (server.client.get(f"/v1/adapters/{name}").json()["digest"] == digests[name]) == (name != "foo")
    assert server.generate("a", PROMPT).status_code == 404


def test_the_base_is_never_touched(server: Running, base: Path, versions: list[Path]) -> None:
    before = server.token_ids(BASE, PROMPT, max_tokens=40)
    for turn in range(6):
        server.put("around", versions[turn % 2])
        server.token_ids("around", PROMPT)
    server.client.delete("/v1/adapters/around")
    assert server.token_ids(BASE, PROMPT, max_tokens=40) == before


def test_the_engine_refuses_weights_of_another_digest_than_was_admitted(server: Running, versions: list[Path]) -> None:
    server.put("checked", versions[0])
    registry = server.service.registry
    lease = registry.lease("checked")
    request_leases = registry.lease_weights([lease])
    weights = request_leases.weights.result()[lease.record.digest]
    request_leases.release()
    assert checked_weights(AdapterUse(weights, 1.0, weights.digest)) is weights
    with pytest.raises(AdapterMismatchError):
        checked_weights(AdapterUse(weights, 1.0, "sha256:" + "0" * 64))


def test_a_lease_that_is_given_back_twice_is_a_defect(server: Running, versions: list[Path]) -> None:
    server.put("twice", versions[0])
    lease = server.service.registry.lease("twice")
    lease.release()
    with pytest.raises(RuntimeError, match="twice"):
        lease.release()
