"""The request router as Ray calls it, with replicas that only tell of themselves."""

import asyncio
from collections import Counter
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest
from structlog.testing import capture_logs

from swaplora_server.cluster.affinity import COLD, Affinity, RouteKey
from swaplora_server.cluster.router import AdapterAffinityRouter

DEPLOYMENT = DeploymentID(name="Engine", app_name="swaplora")
BASE = RouteKey()


class FakeReplica(SimpleNamespace):
    """Some answer sooner than others when they are asked how much waits."""

    async def get_queue_len(self, *, deadline_s: float) -> int:
        for _ in range(10 * (ord(self.replica_id.unique_id) - ord("a"))):
            await asyncio.sleep(0)
        return 0


def replica(name: str, *resident: str, running: int = 0, is_ready: bool = True) -> FakeReplica:
    stats = {"resident": list(resident), "queue": 0, "running": running, "capacity": 64, "is_ready": is_ready}
    return FakeReplica(replica_id=replica_id(name), routing_stats=stats, max_ongoing_requests=100)


def replica_id(name: str) -> Any:
    return ReplicaID(name, DEPLOYMENT)


def router_of(replicas: Iterable[FakeReplica], *, asks_each_time: bool = False) -> Any:
    router = AdapterAffinityRouter(
        DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=not asks_each_time
    )
    router.initialize_state()
    router.update_replicas(list(replicas))
    return router


def pending(key: RouteKey, internal_id: str = "one") -> Any:
    return PendingRequest(args=[key], kwargs={}, metadata=RequestMetadata("r", internal_id))


def adapter(*names: str) -> RouteKey:
    return RouteKey(names)


async def ranked(router: Any, key: RouteKey) -> list[str]:
    ranks = await router.choose_replicas(list(router.curr_replicas.values()), pending(key))
    return [each.replica_id.unique_id for rank in ranks for each in rank]


async def chosen(router: Any, key: RouteKey) -> str:
    """By the whole of Ray's machinery."""
    found = await router._choose_replica_for_request(pending(key))  # noqa: SLF001
    return str(found.replica_id.unique_id)


async def test_all_replicas_are_ranked_and_the_first_two_one_by_one() -> None:
    router = router_of(map(replica, "abcdef"))
    request = pending(adapter("x"))
    ranks = await router.choose_replicas(list(router.curr_replicas.values()), request)
    assert [len(rank) for rank in ranks] == [1, 1, 4]
    assert sorted(await ranked(router, adapter("x"))) == list("abcdef")
    assert request.routing_context.should_backoff


async def test_no_request_is_lost_where_nobody_can_tell_who_is_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray drops it when this raises, and whoever asks waits in vain."""
    for method in ("rank", "routed"):
        monkeypatch.setattr(Affinity, method, Mock(side_effect=OverflowError("a fault of the test")))
        router = router_of(map(replica, "abc"))
        with capture_logs() as said:
            found = {await asyncio.wait_for(chosen(router, adapter("x")), 10) for _ in range(40)}
        assert len(said) == 1
        assert found == {"a", "b", "c"} or method == "routed"


async def test_what_replicas_tell_decides() -> None:
    router = router_of(map(replica, "abcd"))
    last = (await ranked(router, adapter("x")))[-1]
    router.update_replicas([replica(name, *(["x"] if name == last else [])) for name in "abcd"])
    assert (await ranked(router, adapter("x")))[0] == last
    router.update_replicas([replica(name, "x", running=9 if name == last else 0) for name in "abcd"])
    assert (await ranked(router, adapter("x")))[-1] == last


async def test_each_request_gets_the_replica_that_was_chosen_for_it() -> None:
    """However many wait at once, and although calls of one HTTP request share its internal id."""
    router = router_of(map(replica, "abcd"), asks_each_time=True)
    keys = [adapter(f"a{number % 40}") for number in range(200)]
    homes = {key: (await ranked(router, key))[0] for key in keys[:40]}
    router.update_replicas(
        [replica(name, *(key.adapters[0] for key in homes if homes[key] == name)) for name in "abcd"]
    )
    found = await asyncio.wait_for(asyncio.gather(*(chosen(router, key) for key in keys)), 30)
    at_home = [replica for key, replica in zip(keys, found, strict=True) if homes[key] == replica]
    assert len(at_home) > 170  # the others' homes had too much to do
    assert max(Counter(found).values()) <= 1.25 * 200 / 4 + 8  # as many are on their way to a choice at once


async def test_what_comes_at_once_is_spread() -> None:
    router = router_of(map(replica, "abcd"))
    for _ in range(8):
        await chosen(router, BASE)  # so that Ray asks nobody, and routes all that waits at one go
    counts = Counter(await asyncio.gather(*(chosen(router, BASE) for _ in range(80))))
    assert max(counts.values()) - min(counts[name] for name in "abcd") <= 6


async def test_what_has_ended_is_no_load() -> None:
    router = router_of(map(replica, "ab"))
    found = [await chosen(router, adapter("x")) for _ in range(20)]
    assert set(found) == {"a", "b"}
    for name in found:
        if name == "a":
            router.on_request_completed(replica_id(name), "one")
    assert {await chosen(router, adapter("x")) for _ in range(found.count("b") - COLD)} == {"a"}


async def test_what_all_are_asked_was_nobodys_load() -> None:
    """Ray says of that too that it has ended."""
    router = router_of(map(replica, "ab"))
    for _ in range(20):
        await chosen(router, adapter("x"))
    loads = {name: await ranked(router, adapter(f"y{name}")) for name in range(20)}
    for _ in range(40):
        for name in "ab":
            router.on_request_completed(replica_id(name), f"other {name}")
    assert sum(each.in_flight for each in router._affinity._replicas.values()) == 20  # noqa: SLF001
    assert {name: await ranked(router, adapter(f"y{name}")) for name in range(20)} == loads


async def test_a_client_that_leaves_before_its_request_is_sent_is_no_load() -> None:
    router = router_of([replica("a"), replica("b")])
    for _ in range(50):
        waiting = asyncio.ensure_future(chosen(router, adapter("x")))
        while not router._pending_requests_to_fulfill:  # noqa: SLF001
            await asyncio.sleep(0)
        request = router._pending_requests_to_fulfill[0]  # noqa: SLF001
        while not request.future.done():
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
    home = (await ranked(router, adapter("x")))[0]
    assert [await chosen(router, adapter("x")) for _ in range(2)] == [home, home]


async def test_the_same_told_again_is_no_news() -> None:
    """Ray tells of all replicas whenever one has told something: what the others told is then as old as before."""
    router = router_of(map(replica, "ab"))
    home = await chosen(router, adapter("x"))
    for _ in range(COLD):
        await chosen(router, adapter("x"))
    told = [replica(name, "x", running=COLD + 1 if name == home else 0) for name in "ab"]
    router.update_replicas(told)
    for _ in range(COLD + 1):
        router.on_request_completed(replica_id(home), "one")
    router.update_replicas(list(told))
    assert await chosen(router, adapter("x")) == home


async def test_one_that_is_not_ready_is_asked_last_whatever_it_has() -> None:
    """One whose engine has failed has the least to do, for it fails at once."""
    router = router_of([replica("a", "x", is_ready=False), replica("b", running=50), replica("c", running=50)])
    for key in (adapter("x"), BASE, RouteKey((), "session")):
        assert (await ranked(router, key))[-1] == "a"
    router.update_replicas([replica("a", "x"), replica("b", running=50), replica("c", running=50)])
    assert await chosen(router, adapter("x")) == "a"


async def test_the_same_request_goes_to_the_next_each_time() -> None:
    """By rank, and to the first again when all have had it."""
    router = router_of(map(replica, "abc"))
    key = adapter("x")
    order = await ranked(router, key)
    assert [await chosen(router, key) for _ in range(3)] == key.tried == order
    assert await ranked(router, adapter("x")) == order


async def test_a_dead_replica_is_not_ranked() -> None:
    router = router_of(map(replica, "abc"))
    home = (await ranked(router, adapter("x")))[0]
    router.on_replica_actor_died(replica_id(home))
    assert home not in await ranked(router, adapter("x"))
    assert await chosen(router, adapter("x")) != home


async def test_a_call_that_says_nothing_goes_anywhere() -> None:
    router = router_of(map(replica, "abc"))
    request = PendingRequest(args=[Mock()], kwargs={}, metadata=RequestMetadata("r", "one"))
    replicas = list(router.curr_replicas.values())
    firsts = {(await router.choose_replicas(replicas, request))[0][0].replica_id.unique_id for _ in range(60)}
    assert firsts == set("abc")
