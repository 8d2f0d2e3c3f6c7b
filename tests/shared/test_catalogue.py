"""What one server is told, every other one knows: names, versions, aliases, mixtures, gates, pins, sharing."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import adapter_files
from changer import BASE
from replicas import Disturbed, facts, put, registry, replicas, see, store_of
from swaplora_adapters.errors import (
    AdapterBusyError,
    AdapterNotFoundError,
    GateFailedError,
    InvalidAdapterNameError,
    QuotaExceededError,
    VersionMismatchError,
)
from swaplora_adapters.files.disk import StoreError
from swaplora_adapters.registry.names import Judgement
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.sources.source import Sources
from swaplora_adapters.store.conditions import Conditions
from swaplora_adapters.store.records import Alias, Mixing, Target
from swaplora_adapters.store.shared.address import open_objects
from swaplora_adapters.store.shared.history import segments
from swaplora_adapters.store.shared.store import open_store


def weights_of(of: Registry, reference: str) -> str:
    """The digest of what a request of `reference` runs with, once it is in memory."""
    leases = of.lease_weights([of.lease(reference)])
    try:
        [weights] = leases.weights.result(60).values()
        return weights.digest
    finally:
        leases.release()


def test_whatever_one_server_is_told_the_other_knows(address: str, files: list[Path], tmp_path: Path) -> None:
    with replicas(tmp_path, [open_objects(address), open_objects(address)]) as (one, other):

        def same() -> None:
            see(one)
            see(other)
            assert facts(one) == facts(other)

        first = put(one, "sql", files[0]).record
        with pytest.raises(InvalidAdapterNameError):  # before any look: a change sees what all others have changed
            other.put_alias("sql", [Target("sql", 1)])
        same()
        assert weights_of(other, "sql") == first.digest
        second = put(other, "sql", files[1]).record
        assert (second.version, other.card("sql").record.version) == (2, 2)
        same()
        assert weights_of(one, "sql") == second.digest
        one.change("sql", current=1)
        same()
        assert other.card("sql").record.version == 1
        other.change("sql", is_pinned=True, shared_with=["acme"])
        same()
        assert one.card("sql").is_pinned
        one.put_alias("best", [Target("sql@1", 9), Target("sql", 1)])
        put(one, "tales", files[2])
        other.put_mixture("both", ["sql", "tales"], Mixing(1, 0.5))
        same()
        with pytest.raises(AdapterBusyError, match="best"):
            other.delete("sql")
        one.set_gate("tales", json.dumps({"tasks": []}))
        held = put(other, "tales", files[3]).record
        same()
        assert (held.version, one.card("tales").record.version) == (2, 1)
        with pytest.raises(GateFailedError):
            one.change("tales", current=2)
        verdict = {"reason": None}
        other.judge("tales", Judgement(json.dumps({"tasks": []}), 2, 1, has_passed=True, verdict=verdict))
        assert one.judge("tales", Judgement(json.dumps({"tasks": []}), 2, 1, has_passed=True, verdict=verdict)) is None
        same()
        assert one.card("tales").record.version == 2
        one.delete_alias("best")
        one.delete_mixture("both")
        removal = other.delete("sql")
        removal.freed.result(60)
        same()
        with pytest.raises(AdapterNotFoundError):
            one.lease("sql")
        assert put(one, "sql", files[0]).record.version == 3  # numbers never start again, wherever they were given
        same()
        for each in (one, other):
            each.check_integrity()


def test_a_new_server_makes_itself_of_the_log_and_goes_on_where_it_was(
    address: str, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SEGMENT", 4)
    objects = open_objects(address)
    with replicas(tmp_path, [objects, objects]) as (one, other):
        for number in range(9):
            put(one, f"a{number % 3}", files[number % 4])
        one.put_alias("gone", [Target("a0", 1)])
        one.put_alias("kept", [Target("a1", 1)])
        see(other)
        known = facts(other)
    with replicas(tmp_path, [objects]) as (one,):  # with the data directory of before
        one.delete_alias("gone")
        taken_in = put(one, "a0", files[5], conditions=Conditions(if_news=True)).record
        one._store.tidy()  # noqa: SLF001
        put(one, "late", files[0])
        expected = facts(one)
        assert expected.keys() == known.keys() - {"gone"} | {"late"}
        fresh = registry(tmp_path / "fresh", objects)
        try:
            assert facts(fresh) == expected
            assert fresh.names.origin("a0") == taken_in.digest
            assert fresh.revision == one.revision
            assert weights_of(fresh, "late") == weights_of(one, "late")
        finally:
            fresh.close()
    with replicas(tmp_path, [objects, objects]) as (_, other):  # which was away meanwhile
        assert facts(other) == expected


def test_a_data_directory_is_the_copy_of_one_store_alone(files: list[Path], tmp_path: Path) -> None:
    for name in ("others", "empty"):
        (tmp_path / name).mkdir()
    objects, others = open_objects(str(tmp_path / "shared")), open_objects(str(tmp_path / "others"))
    with replicas(tmp_path, [objects]) as (one,):
        put(one, "sql", files[0])
    with replicas(tmp_path / "b", [others]):
        pass
    with pytest.raises(StoreError, match="a copy of another shared store"):
        registry(tmp_path / "data0", others)
    with pytest.raises(StoreError, match="is it right"):
        registry(tmp_path / "data0", open_objects(str(tmp_path / "empty")))
    with pytest.raises(StoreError, match="--shared-store"):
        open_store(tmp_path / "data0", None, BASE)
    [entry] = (tmp_path / "shared").glob("*/log/*1")
    entry.unlink()  # as if the store were an older one of a backup
    with pytest.raises(StoreError, match="changes that the shared store does not have"):
        registry(tmp_path / "data0", objects)


def test_what_a_server_had_before_it_shared_is_what_all_have_then(
    address: str, files: list[Path], tmp_path: Path
) -> None:
    store = open_store(tmp_path / "data0", None, BASE)
    store.close()
    alone = local(tmp_path / "data0")
    put(alone, "sql", files[0])
    put(alone, "sql", files[1])
    alone.put_alias("best", [Target("sql@1", 1)])
    put(alone, "deleted", files[2])
    alone.delete("deleted")
    known = facts(alone)
    alone.close()
    objects = open_objects(address)
    with replicas(tmp_path, [objects, objects]) as (one, other):
        assert facts(one) == facts(other) == known
        assert weights_of(other, "best") == one.card("sql").versions[0].digest
        assert put(other, "deleted", files[2]).record.version == 2
        assert put(one, "sql", files[2]).record.version == 3
    late = local(tmp_path / "late")
    put(late, "mine", files[3])
    late.close()
    with pytest.raises(StoreError, match="does not know of"):
        registry(tmp_path / "late", objects)


def local(data_dir: Path) -> Registry:
    """A server's that shares nothing."""
    return Registry(
        open_store(data_dir, None, BASE),
        sources=Sources(allowed=(), folder=None, max_weights_bytes=0),
        layers=adapter_files.LAYERS,
        dtype=torch.float32,
        memory_budget=1 << 30,
        wait_seconds=30,
        keep_versions=100,
        base_model="base",
    )


def at_once(*jobs: Callable[[], object]) -> list[object]:
    """What each returned or raised."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(job) for job in jobs]
        return [future.exception() or future.result() for future in futures]


def test_of_two_that_replace_one_version_at_once_one_does(address: str, files: list[Path], tmp_path: Path) -> None:
    objects = [open_objects(address), open_objects(address)]
    with replicas(tmp_path, objects) as (one, other):
        digest = put(one, "sql", files[0]).record.digest
        for number in range(6):
            conditions = Conditions(if_match=digest)
            ended = at_once(
                lambda c=conditions, n=number: put(one, "sql", files[1 + n % 2], conditions=c),  # type: ignore[misc]
                lambda c=conditions, n=number: put(other, "sql", files[3 + n % 2], conditions=c),  # type: ignore[misc]
            )
            assert [isinstance(each, VersionMismatchError) for each in ended].count(True) == 1, ended
            see(one)
            see(other)
            assert facts(one) == facts(other)
            digest = one.card("sql").record.digest


def test_what_another_server_removes_is_free_once_no_request_holds_it(files: list[Path], tmp_path: Path) -> None:
    objects = open_objects(str(tmp_path / "shared"))
    with replicas(tmp_path, [objects, objects], keep_versions=1) as (one, other):
        digests = [put(one, "sql", files[0]).record.digest]
        see(other)
        held = other.lease_weights([other.lease("sql")])
        held.weights.result(60)
        digests.append(put(one, "sql", files[1]).record.digest)  # which outdates the first
        see(other)
        assert [record.digest for record in other.card("sql").versions] == digests[1:]
        nbytes = other.resident_bytes
        other.check_integrity()
        assert other.resident_bytes == nbytes > 0
        blob = tmp_path / "data1/blobs" / digests[0].removeprefix("sha256:")
        assert blob.exists()
        held.release()
        other.check_integrity()
        assert other.resident_bytes == 0
        assert not blob.exists()


def test_a_version_that_another_server_rolls_back_to_is_not_outdated(files: list[Path], tmp_path: Path) -> None:
    objects = [Disturbed(open_objects(str(tmp_path / "shared"))) for _ in range(2)]
    with replicas(tmp_path, objects, keep_versions=2) as (one, other):
        for number in range(2):
            put(one, "sql", files[number])
        made: list[str] = []

        def roll_back(call: str, key: str) -> None:
            if call == "create" and "/log/" in key:
                made.append(key)
                if len(made) == 2:  # the first is the publish, this is what would remove version 1
                    other.change("sql", current=1)

        objects[0].before = roll_back
        put(one, "sql", files[2])
        objects[0].come_back()
        see(other)
        assert len(made) >= 2
        assert facts(one) == facts(other)
        assert one.card("sql").record.version == 1


def test_a_quota_holds_for_all_servers_together(files: list[Path], tmp_path: Path) -> None:
    address = str(tmp_path / "shared")
    with replicas(tmp_path, [open_objects(address)] * 3) as opened:

        def admit(of: Registry) -> Callable[[str, str, int], None]:
            def check(name: str, _digest: str, _nbytes: int) -> None:
                if len(of.names.index.all()) >= 4:
                    raise QuotaExceededError("there are four")

            return check

        jobs = [lambda of=of, k=k: put(of, f"n{k}", files[k % 6], admit=admit(of)) for k, of in enumerate(opened * 4)]
        ended = at_once(*jobs)
        assert [isinstance(each, QuotaExceededError) for each in ended].count(True) == 8, ended
        for of in opened:
            see(of)
            assert len(of.names.index.all()) == 4


@pytest.mark.parametrize("has_namesake", [False, True])
def test_an_alias_that_is_called_as_an_adapter_is_or_was_stays_in_a_copy_that_begins_again(
    files: list[Path], tmp_path: Path, has_namesake: bool
) -> None:
    """The log says who is called what: a server that was restarted is to know no less than the others."""
    objects = open_objects(str(tmp_path / "shared"))
    with replicas(tmp_path, [objects, objects]) as (one, other):
        put(one, "sql", files[0])
        put(one, "prod", files[1])
        one.delete("prod")
        if has_namesake:  # as an earlier release has made it
            put(one, "prod", files[2])
            one.names.changes.make(lambda: store_of(one).put_alias(Alias("prod", (Target("sql", 1),))))
        else:
            one.put_alias("prod", [Target("sql", 1)])
        see(other)
        known = facts(other)
    with replicas(tmp_path, [objects, objects]) as opened:
        assert [facts(of) for of in opened] == [known, known]
        assert not any(store_of(of).notes for of in opened)
        if not has_namesake:
            with pytest.raises(InvalidAdapterNameError, match="prod is an alias"):
                put(opened[1], "prod", files[3])
