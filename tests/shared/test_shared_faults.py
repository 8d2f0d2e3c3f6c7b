"""A store that fails, is slow or loses answers, and servers that are killed: what was acknowledged is there."""

import os
import random
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import pytest

from changer import BASE, STEPS, publish
from replicas import Disturbed, facts, put, registry, replicas, see, see_at_last, unreachable
from repository import ROOT
from swaplora_adapters.errors import (
    AdapterFailedError,
    AdapterNotFoundError,
    StorageFailedError,
    StoreUnreachableError,
)
from swaplora_adapters.files.naming import WEIGHTS_FILE
from swaplora_adapters.registry.changes import Changes
from swaplora_adapters.store.shared import files as shared_files
from swaplora_adapters.store.shared.address import open_objects
from swaplora_adapters.store.shared.store import SharedStore

LOG = "/log/"
FOLDER = pytest.mark.parametrize("address", ["folder"], indirect=True)


@pytest.mark.parametrize("every", [10, 3])
def test_a_store_that_fails_now_and_then_loses_nothing_that_was_acknowledged(
    objects: list[Disturbed], files: list[Path], tmp_path: Path, every: int
) -> None:
    """Every tenth call is never noticed. Where every third fails a change is made, or it is told that it is not."""
    rng = random.Random(0)
    with replicas(tmp_path, objects) as opened:
        for each in objects:
            each.fail_every(every)
        least: dict[str, int] = {}
        num_refused = 0
        for number in range(30):
            name, of = rng.choice(["a", "b", "c"]), rng.choice(opened)
            try:
                record = put(of, name, files[number % 6]).record
                assert record.version >= least.get(name, 0)
                least[name] = record.version
            except StoreUnreachableError:
                num_refused += 1
        for each in objects:
            each.come_back()
        for of in opened:
            see_at_last(of)
        assert facts(opened[0]) == facts(opened[1])
        for name, version in least.items():
            assert version in {record.version for record in opened[0].names.index.get(name).versions}
        assert every < 10 or num_refused == 0


def test_a_change_whose_answer_is_lost_is_found_to_be_made(
    objects: list[Disturbed], files: list[Path], tmp_path: Path
) -> None:
    lost: list[str] = []
    with replicas(tmp_path, objects) as (one, other):

        def lose(call: str, key: str) -> None:
            if call == "create" and LOG in key and not lost:
                lost.append(key)
                raise unreachable()

        objects[0].after = lose
        assert put(one, "sql", files[0]).is_first
        assert len(lost) == 1
        see(other)
        assert facts(one) == facts(other)
        assert one.revision == other.revision == 1


def test_a_change_of_which_nobody_knows_is_refused_and_is_then_what_it_came_to(
    objects: list[Disturbed], files: list[Path], tmp_path: Path
) -> None:
    """Made, but neither that nor anything else was heard from then on."""
    with replicas(tmp_path, objects) as (one, other):
        put(one, "sql", files[0])

        def lose_all(call: str, key: str) -> None:
            if call == "create" and LOG in key:
                objects[0].vanish()
                raise unreachable()

        objects[0].after = lose_all
        with pytest.raises(StoreUnreachableError):
            put(one, "sql", files[1])
        assert one.card("sql").record.version == 1
        objects[0].come_back()
        see(other)
        see_at_last(one)
        assert one.card("sql").record.version == 2
        assert facts(one) == facts(other)


def test_a_change_that_comes_to_the_log_too_late_is_none(
    objects: list[Disturbed], files: list[Path], tmp_path: Path
) -> None:
    """The request that would have made it was on its way when another server made the change in its place."""
    late: list[tuple[str, bytes]] = []
    with replicas(tmp_path, objects) as (one, other):
        create = objects[0].create

        def postponed(key: str, content: bytes) -> bool:
            if LOG not in key:
                return create(key, content)
            late.append((key, content))
            raise unreachable()

        objects[0].create = postponed  # type: ignore[method-assign]
        with pytest.raises(StoreUnreachableError):
            put(one, "sql", files[0])
        assert put(other, "tales", files[1]).record.version == 1
        assert not any(create(key, content) for key, content in late)
        objects[0].create = create  # type: ignore[method-assign]
        see(one)
        assert facts(one) == facts(other)
        assert "sql" not in one.names.index
        assert put(one, "sql", files[0]).record.version == 1


def test_an_outrun_publish_keeps_its_files(objects: list[Disturbed], files: list[Path], tmp_path: Path) -> None:
    """Three times another server is faster; what is published then is whole, here and there."""
    with replicas(tmp_path, objects) as (one, other):
        outrun: list[str] = []

        def be_faster(call: str, key: str) -> None:
            if call == "create" and LOG in key and len(outrun) < 3:
                outrun.append(key)
                put(other, "tales", files[len(outrun)])

        objects[0].before = be_faster
        record = put(one, "sql", files[0]).record
        assert (len(outrun), one.revision) == (3, 4)
        see(other)
        for of in (one, other):
            leases = of.lease_weights([of.lease("sql")])
            assert [*leases.weights.result(60)] == [record.digest]
            leases.release()


@FOLDER
def test_files_that_are_damaged_here_are_fetched_again_and_those_that_are_damaged_there_are_not_served(
    objects: list[Disturbed], files: list[Path], tmp_path: Path
) -> None:
    with replicas(tmp_path, objects) as (one, other):
        digest = put(one, "sql", files[0]).record.digest
        see(other)
        for of, number in ((one, 0), (other, 1)):
            lease = of.lease_weights([of.lease("sql")])
            lease.weights.result(60)
            lease.release()
            of.check_integrity()
            here = tmp_path / f"data{number}/blobs" / digest.removeprefix("sha256:") / WEIGHTS_FILE
            here.write_bytes(here.read_bytes()[:-1] + b"\0")
    with replicas(tmp_path, objects) as (one, other):
        refused = one.lease_weights([one.lease("sql")])
        with pytest.raises(StorageFailedError, match="fetched again"):
            refused.weights.result(60)
        refused.release()
        again = one.lease_weights([one.lease("sql")])
        assert [*again.weights.result(60)] == [digest]
        again.release()
        [there] = (tmp_path / "shared").glob(f"*/blobs/*/*/{WEIGHTS_FILE}")
        there.write_bytes(there.read_bytes()[:-1] + b"\0")
        for error in (StorageFailedError, AdapterFailedError):
            refused = other.lease_weights([other.lease("sql")])
            with pytest.raises(error):
                refused.weights.result(60)
            refused.release()


def test_what_no_version_has_is_swept_once_it_is_old_and_nothing_else(
    objects: list[Disturbed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(SharedStore(tmp_path / "data", objects[0], BASE)) as store:
        changes = Changes(store, lambda _touched: None)
        for name, weights in (("kept", b"1"), ("gone", b"2")):
            publish(store, changes, name, weights)
        changes.make(lambda: store.delete("gone"))
        assert store.sweep() == 0
        monkeypatch.setattr(shared_files, "SWEPT_AFTER", -1.0)
        assert store.sweep() == 2
        assert [each.key.rpartition("/")[2] for each in objects[0].under("")].count(WEIGHTS_FILE) == 1
        publish(store, changes, "gone", b"2")  # from a place of its own
        assert store.sweep() == 0
        assert store.current("gone").version == 2
        with closing(SharedStore(tmp_path / "other", objects[1], BASE)) as other:
            publish(other, Changes(other, lambda _touched: None), "new", b"3")
        assert store.sweep() == 0  # it does not know yet what that is referred to by


def run(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/tests/support:{ROOT}/tests/shared"}
    command = [sys.executable, str(ROOT / "tests/shared/changer.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize(("address", "count"), [("folder", 15), ("bucket", 5)], indirect=["address"])
def test_processes_that_change_one_name_at_once_make_every_version_once(
    address: str, tmp_path: Path, count: int
) -> None:
    changers = [run(str(tmp_path / f"data{number}"), address, "sql", str(count), "") for number in range(2)]
    heard = [int(line) for changer in changers for line in changer.communicate()[0].split()]
    assert [changer.returncode for changer in changers] == [0, 0]
    with closing(SharedStore(tmp_path / "late", open_objects(address), BASE)) as store:
        versions = store.versions("sql")
        assert [record.version for record in versions] == list(range(1, 2 * count + 1))
        assert len({record.digest for record in versions}) == 2 * count
        assert store.revision == 2 * count
    assert sorted(heard) == list(range(1, 2 * count + 1))


@pytest.mark.parametrize(
    ("address", "step"), [*(("folder", step) for step in STEPS), ("bucket", STEPS[1])], indirect=["address"]
)
def test_a_server_that_is_killed_amid_a_change_leaves_it_made_or_not(address: str, tmp_path: Path, step: str) -> None:
    changer = run(str(tmp_path / "data"), address, "sql", "1", step)
    assert changer.communicate()[0] == ""
    assert changer.returncode == -9
    with (
        closing(SharedStore(tmp_path / "other", open_objects(address), BASE)) as other,
        closing(SharedStore(tmp_path / "data", open_objects(address), BASE)) as again,
    ):
        assert again.names() == other.names() == ([] if step == STEPS[0] else ["sql"])
        assert again.revision == other.revision
        for store in (other, again):
            with suppress(AdapterNotFoundError):
                digest = store.current("sql").digest
                store.bring(digest)
                store.verify(digest)
            store.check_integrity()


def test_a_store_that_is_not_there_starts_no_server(objects: list[Disturbed], tmp_path: Path) -> None:
    objects[0].vanish()
    with pytest.raises(StoreUnreachableError):
        registry(tmp_path / "data", objects[0])
    objects[0].come_back()
    registry(tmp_path / "data", objects[0]).close()
