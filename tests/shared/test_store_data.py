"""What the store must not lose: files, changes that were acknowledged, and which store a data directory is of."""

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from botocore.stub import Stubber

from changer import BASE
from replicas import Disturbed, facts, put, registry, replicas, see, store_of, unreachable
from swaplora_adapters.errors import StorageFailedError, StorageFullError, StoreChangedError, StoreUnreachableError
from swaplora_adapters.files.disk import StoreError
from swaplora_adapters.files.naming import CONFIG_FILE
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.store.catalogue import Catalogue
from swaplora_adapters.store.records import Target, Touched
from swaplora_adapters.store.shared import files as shared_files
from swaplora_adapters.store.shared import store as shared_store
from swaplora_adapters.store.shared.address import open_objects
from swaplora_adapters.store.shared.bucket import BucketObjects
from swaplora_adapters.store.shared.history import compaction, segments
from swaplora_adapters.store.shared.history import log as shared_log
from swaplora_adapters.store.shared.store import SharedStore
from test_catalogue import local, weights_of


@pytest.fixture
def objects(tmp_path: Path) -> list[Disturbed]:
    return [Disturbed(open_objects(str(tmp_path / "shared"))) for _ in range(2)]


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a snapshot after each change, where somebody makes one."""
    monkeypatch.setattr(segments, "SEGMENT", 1)


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> Callable[[Registry], int]:
    """Twice, a day apart; how many objects went the second time."""

    def sweep(of: Registry) -> int:
        store = store_of(of)
        assert store.sweep() == 0
        with monkeypatch.context() as patch:
            patch.setattr(shared_files, "SWEPT_AFTER", -1.0)
            return store.sweep()

    return sweep


def places(of: Registry) -> dict[str, str]:
    return store_of(of)._catalogue.places()  # noqa: SLF001


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("by_snapshot", [False, True])
def test_files_that_were_sent_anew_are_where_the_last_change_says(
    objects: list[Disturbed], files: list[Path], tmp_path: Path, sweep: Callable[[Registry], int], by_snapshot: bool
) -> None:
    """One server deletes and uploads the same bytes again; the other takes over both changes at once."""
    with replicas(tmp_path, objects[:1]) as (one,), ExitStack() as stack:

        def begin() -> Registry:
            return stack.enter_context(replicas(tmp_path / "other", objects[1:]))[0]

        def replace() -> None:
            one.delete("sql").freed.result(60)
            assert put(one, "sql", written_otherwise.parent).record.digest == digest

        digest = put(one, "sql", files[0]).record.digest
        written_otherwise = shutil.copytree(files[0], tmp_path / "otherwise") / CONFIG_FILE
        written_otherwise.write_text(json.dumps(json.loads(written_otherwise.read_bytes()), indent=7))
        other = begin()
        assert weights_of(other, "sql") == digest
        if by_snapshot:
            stack.close()
            replace()
            store_of(one).tidy()
            other = begin()
        else:
            with other.names.changes:
                replace()
                other.names.changes.look()
        assert places(one) == places(other)
        assert facts(one) == facts(other)  # sizes, too
        assert sweep(other) == 2  # of the place that was before
        other.check_integrity()
        with replicas(tmp_path / "late", objects[:1]) as (late,):
            assert weights_of(late, "sql") == digest


@pytest.mark.parametrize("is_elsewhere", [False, True])
@pytest.mark.parametrize("lost", ["store.json", "/snapshots/", None])
def test_a_founding_that_is_begun_again_is_of_the_files_that_were_sent(
    objects: list[Disturbed],
    files: list[Path],
    tmp_path: Path,
    sweep: Callable[[Registry], int],
    lost: str | None,
    is_elsewhere: bool,
) -> None:
    """Of those that were sent to the address at which the store comes to be."""
    alone = local(tmp_path / "data0")
    digests = [put(alone, f"a{number}", files[number]).record.digest for number in range(2)]
    alone.close()

    def lose(call: str, key: str) -> None:
        if (call == "create" and lost is not None and lost in key) or (call == "put" and lost is None):
            raise unreachable()

    objects[0].before = lose
    with pytest.raises(StoreUnreachableError):
        registry(tmp_path / "data0", objects[0])
    objects[0].come_back()
    if is_elsewhere:
        (tmp_path / "elsewhere").mkdir()
        objects = [Disturbed(open_objects(str(tmp_path / "elsewhere"))) for _ in range(2)]
    with replicas(tmp_path, objects) as (one, other):
        assert places(one) == places(other)
        assert sweep(one) == 0
        assert [weights_of(other, f"a{number}") for number in range(2)] == digests


@pytest.mark.parametrize("is_read", [True, False])
def test_changes_that_were_taken_over_before_something_failed_are_known_after_it(
    objects: list[Disturbed], files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_read: bool
) -> None:
    """What fails is the look at the change after the first, or that memory hears of both."""
    monkeypatch.setattr(shared_store, "_AT_ONCE", 1)
    with replicas(tmp_path, objects) as (one, other), other.names.changes:
        put(one, "sql", files[0])
        first = one.revision
        put(one, "tales", files[1])

        def fail(_touched: Touched) -> None:
            raise unreachable()

        def fail_second(_call: str, key: str) -> None:
            if key.endswith(f"/log/{first + 1:020d}"):
                raise unreachable()

        with monkeypatch.context() as patch:
            if is_read:
                patch.setattr(other.names.changes, "_adopt", fail)
            else:
                objects[1].before = fail_second
            with pytest.raises(StoreUnreachableError):
                other.names.changes.look()
        objects[1].come_back()
        other.names.changes.look()
        assert facts(other) == facts(one)


def test_an_own_change_after_which_something_fails_is_known_to_the_next_request(
    objects: list[Disturbed], files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with replicas(tmp_path, objects) as (one, other):
        put(one, "sql", files[0])

        def fail(_name: str) -> None:
            raise StorageFailedError("the disk does not read (for a test)")

        with monkeypatch.context() as patch:
            patch.setattr(one.names, "_refresh", fail)
            with pytest.raises(StorageFailedError, match="for a test"):
                put(one, "sql", files[1])
        see(one)
        see(other)
        assert one.card("sql").record.version == 2
        assert facts(one) == facts(other)


def test_a_change_that_is_made_and_finds_no_room_here_may_have_been_made(
    objects: list[Disturbed], files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with replicas(tmp_path, objects) as (one, other):

        def be_full(*_arguments: object) -> None:
            raise StorageFullError("no room is left")

        with monkeypatch.context() as patch:
            patch.setattr(store_of(one)._names, "put", be_full)  # noqa: SLF001
            with pytest.raises(StoreUnreachableError, match="the change is made"):
                put(one, "sql", files[0])
        see(other)
        see(one)
        assert facts(one) == facts(other)
        assert "sql" in one.names.index


class Overwriting(Disturbed):
    """A store that knows no conditional writes, and says nothing of it."""

    def create(self, key: str, content: bytes) -> bool:
        if not super().create(key, content):
            self.remove(key)
            super().create(key, content)
        return True


def test_a_store_that_writes_over_what_is_there_is_refused(tmp_path: Path) -> None:
    objects = Overwriting(open_objects(str(tmp_path / "shared")))
    for _ in range(2):
        with pytest.raises(StoreError, match="conditional"):
            registry(tmp_path / "data", objects)


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("is_adopted", [False, True])
def test_a_directory_whose_store_has_gone_another_way_is_refused(
    files: list[Path], tmp_path: Path, is_adopted: bool
) -> None:
    """The store was brought back from a backup, and got as many changes again, the last of them alike."""
    shared = tmp_path / "shared"

    def change(of: Registry, *contents: int) -> None:
        for content in contents:
            put(of, "tales", files[content])
        of.put_alias("best", [Target("sql", 1)])

    with replicas(tmp_path, [open_objects(str(shared))]) as (one,):
        put(one, "sql", files[0])
        shutil.copytree(shared, tmp_path / "backup")
        change(one, 1)
        store_of(one).tidy()
    if is_adopted:
        with replicas(tmp_path / "by_snapshot", [open_objects(str(shared))]):
            pass
    shutil.rmtree(shared)
    (tmp_path / "backup").rename(shared)
    with replicas(tmp_path / "other", [open_objects(str(shared))]) as (other,):
        change(other, 2)
        store_of(other).tidy()
        put(other, "late", files[3])
    with pytest.raises(StoreError, match="changes that the shared store does not have"):
        registry(tmp_path / ("by_snapshot/data0" if is_adopted else "data0"), open_objects(str(shared)))
    with replicas(tmp_path / "other", [open_objects(str(shared))]) as (other,):
        assert "late" in other.names.index


def test_what_a_request_has_leased_is_fetched_though_it_is_deleted_and_swept_elsewhere(
    objects: list[Disturbed], files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with replicas(tmp_path, objects) as (one, other):
        digest = put(one, "sql", files[0]).record.digest
        see(other)
        leases = other.lease_weights([other.lease("sql")])
        leases.release()
        lease = other.lease("sql")
        one.delete("sql").freed.result(60)
        for folder in (tmp_path / "shared").glob("*/blobs/*/*/*"):
            os.utime(folder, (0, 0))  # the files are old
        assert store_of(one).sweep() == 0
        leases = other.lease_weights([lease])
        assert [*leases.weights.result(60)] == [digest]
        leases.release()
        monkeypatch.setattr(shared_files, "SWEPT_AFTER", -1.0)
        assert store_of(one).sweep() == 2  # a day later


@pytest.mark.parametrize("is_there", [False, True])
def test_a_conflict_of_two_writes_is_told_by_what_is_there_then(
    bucket: str, is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = open_objects(bucket)
    assert isinstance(objects, BucketObjects)
    if is_there:
        objects.create("key", b"another's")
    get: Callable[[str], bytes | None] = objects.get
    with Stubber(objects._small) as stub:  # noqa: SLF001
        stub.add_client_error("put_object", "ConditionalRequestConflict", http_status_code=409)
        monkeypatch.setattr(objects, "get", lambda key: get_past(stub, get, key))
        if is_there:
            assert objects.create("key", b"ours") is False
        else:
            with pytest.raises(StoreUnreachableError):
                objects.create("key", b"ours")


def get_past(stub: Stubber, get: Callable[[str], bytes | None], key: str) -> bytes | None:
    stub.deactivate()
    return get(key)


def test_a_folder_must_be_there_and_what_a_crash_left_in_it_is_swept(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not there"):
        open_objects(str(tmp_path / "unmounted"))
    assert not (tmp_path / "unmounted").exists()
    open_objects(str(tmp_path / "shared"))
    left, new = (tmp_path / "shared/staging" / name for name in ("left", "new"))
    for path in (left, new):
        path.write_bytes(b"1")
    os.utime(left, (time.time() - 25 * 3600,) * 2)
    open_objects(str(tmp_path / "shared"))
    assert (left.exists(), new.exists()) == (False, True)


def test_a_draft_that_sqlite_has_ended_by_itself_says_why(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "catalogue.sqlite3")

    def fail() -> None:
        with catalogue.draft():
            catalogue._connection.execute("ROLLBACK")  # noqa: SLF001
            raise StorageFullError("no room is left")

    for _ in range(2):
        with pytest.raises(StorageFullError):
            fail()
    catalogue.close()


def test_one_server_makes_the_snapshot_of_all(
    objects: list[Disturbed], files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swaplora_adapters.registry.changes.TIDY_SECONDS", 3600)
    with replicas(tmp_path, objects) as (one, other):
        for number in range(3):
            put(one, "sql", files[number])
        see(other)
        monkeypatch.setattr(segments, "SEGMENT", 2)
        made: list[str] = []
        objects[0].after = objects[1].after = lambda call, key: made.extend([key] if call == "create" else [])
        store_of(one).tidy()
        store_of(other).tidy()
        assert len(made) == 1


def test_the_first_server_says_which_base_a_store_is_for(objects: list[Disturbed], tmp_path: Path) -> None:
    """Configurations that other libraries understand otherwise are not compared."""
    registry(tmp_path / "data0", objects[0]).close()
    for another in (
        BASE._replace(name="else"),
        BASE._replace(dtype="bfloat16"),
        BASE._replace(weights="2" * 64),
        BASE._replace(reading="2" * 64),
        BASE._replace(weights="2" * 64, libraries="transformers 2, tokenizers 1"),
    ):
        with pytest.raises(StoreError, match="for another base") as refused:
            registry(tmp_path / "data1", objects[1], another, base_model=another.name)
        assert str(BASE) in str(refused.value)
        assert str(another) in str(refused.value)
    newer = BASE._replace(reading="2" * 64, libraries="transformers 2, tokenizers 1")
    registry(tmp_path / "data1", objects[1], newer).close()
    [said_at] = [each.key for each in objects[0].under("") if each.key.endswith("/base.json")]
    objects[0].remove(said_at)  # as the message tells
    registry(tmp_path / "data1", objects[1], BASE._replace(weights="2" * 64)).close()
    with pytest.raises(StoreError, match="for another base"):
        registry(tmp_path / "data0", objects[0])


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[Registry], None]:
    """An hour after a snapshot of all but the last change: up to the one before."""
    monkeypatch.setattr(segments, "SEGMENT", 2)
    monkeypatch.setattr(shared_log, "TRUST_SECONDS", -1.0)  # as after a sleep
    monkeypatch.setattr("swaplora_adapters.registry.changes.TIDY_SECONDS", 3600)

    def cut(of: Registry) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(compaction, "GRACE_SECONDS", -1.0)
            store_of(of).tidy()  # up to a snapshot that was found before
            store_of(of).tidy()

    return cut


def test_a_server_that_is_behind_the_log_begins_at_the_snapshot(
    objects: list[Disturbed], files: list[Path], tmp_path: Path, cut: Callable[[Registry], None]
) -> None:
    """One that runs, one that was away, and one that is new: with what was changed, removed and pointed elsewhere."""
    with replicas(tmp_path / "away", objects[1:]) as (away,):
        put(away, "sql", files[0])
        away.put_alias("gone", [Target("sql", 1)])
        away.put_alias("kept", [Target("sql", 1)])
        assert away.revision == 3
    with replicas(tmp_path, objects) as (one, other):
        see(other)
        with other.names.changes:
            put(one, "sql", files[1])
            one.delete_alias("gone")
            store_of(one).tidy()
            one.put_alias("kept", [Target("sql@1", 1)])
            put(one, "tales", files[2])
            cut(one)
            left = [each.key for each in objects[0].under("") if "/log/" in each.key]
            assert [int(key[-3:]) for key in left] == [5, 6, 7]
        see(other)
        assert facts(other) == facts(one)
        assert put(other, "sql", files[3]).record.version == 3
        with replicas(tmp_path / "away", objects[1:]) as (away,), replicas(tmp_path / "new", objects[1:]) as (new,):
            see(one)
            assert facts(away) == facts(new) == facts(one)
            assert weights_of(new, "kept") == weights_of(one, "kept")


def test_a_store_that_was_brought_back_as_it_was_is_noticed_by_servers_that_run(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No change of theirs is left in it, and none is taken over of what others have made of it since."""
    monkeypatch.setattr(shared_log, "TRUST_SECONDS", -1.0)  # as ten seconds later
    shared = tmp_path / "shared"
    objects = [open_objects(str(shared)) for _ in range(3)]
    with replicas(tmp_path, objects[:2]) as (one, other):
        put(one, "sql", files[0])
        shutil.copytree(shared, tmp_path / "backup")
        put(one, "sql", files[1])
        put(one, "tales", files[1])
        see(other)
        known = facts(other)
        shutil.rmtree(shared)
        (tmp_path / "backup").rename(shared)
        with pytest.raises(StoreChangedError, match="change 3"):
            one.put_alias("best", [Target("sql", 1)])
        assert [each.key[-1] for each in objects[0].under("") if "/log/" in each.key] == ["1"]
        with replicas(tmp_path / "new", objects[2:]) as (new,):
            for number in range(4):
                put(new, "late", files[2 + number % 2])
            with pytest.raises(StoreChangedError):
                other.seen().result(60)
            with pytest.raises(StoreChangedError):
                put(other, "late", files[3])
            assert facts(other) == known
            assert other.names.changes.is_stuck
            assert {each.current.name for each in new.names.index.all()} == {"sql", "late"}


def test_a_store_whose_other_history_is_longer_by_now_is_noticed_at_its_first_change(
    files: list[Path], tmp_path: Path
) -> None:
    """Within the time in which nobody asks whether the store is still the same."""
    shared = tmp_path / "shared"
    objects = [open_objects(str(shared)) for _ in range(2)]
    with replicas(tmp_path, objects[:1]) as (one,):
        put(one, "sql", files[0])
        shutil.copytree(shared, tmp_path / "backup")
        put(one, "tales", files[1])
        see(one)
        shutil.rmtree(shared)
        (tmp_path / "backup").rename(shared)
        with replicas(tmp_path / "new", objects[1:]) as (new,):
            put(new, "late", files[2])
            put(new, "late", files[3])
            with pytest.raises(StoreChangedError):
                one.seen().result(60)
            assert "late" not in one.names.index


def test_a_backup_in_order_is_whole_though_the_log_is_cut_meanwhile_and_another_is_refused(
    files: list[Path], tmp_path: Path, cut: Callable[[Registry], None]
) -> None:
    """The order is the documented one: what says which store it is, snapshots, ids of what was cut, the log, files."""
    shared, backup, late = tmp_path / "shared", tmp_path / "backup", tmp_path / "late"
    with replicas(tmp_path, [open_objects(str(shared))]) as (one,):
        put(one, "sql", files[0])
        put(one, "sql", files[1])
        store_of(one).tidy()
        for folder in (backup, late):
            copy(shared, folder, "snapshots", "trimmed")
        put(one, "tales", files[2])
        put(one, "tales", files[3])
        cut(one)
        copy(shared, backup, "log", "blobs")
        known = facts(one)
        put(one, "tales", files[0])
        put(one, "tales", files[1])
        cut(one)
        copy(shared, late, "log", "blobs")
    with replicas(tmp_path / "brought_back", [open_objects(str(backup))]) as (back,):
        assert facts(back) == known
        assert put(back, "tales", files[4]).record.version == 3
    with pytest.raises(StoreError, match="not this one"):
        registry(tmp_path / "of_late", open_objects(str(late)))


def copy(shared: Path, backup: Path, *parts: str) -> None:
    """These of a store's objects, in this order, and what says which store it is."""
    store = next(shared.glob("*/log")).parent
    for path in (
        each for part in parts for each in [shared / "store.json", *store.glob("*.json"), *store.glob(f"{part}/**/*")]
    ):
        target = backup / path.relative_to(shared)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            shutil.copy2(path, target)


def test_a_change_that_is_checked_in_a_store_that_was_just_brought_back_is_taken_out_of_it(
    files: list[Path], tmp_path: Path, objects: list[Disturbed]
) -> None:
    """It came between two checks, so that it was made where it follows nothing."""
    with replicas(tmp_path, objects[:1]) as (one,):
        put(one, "sql", files[0])
        put(one, "sql", files[1])

        def bring_back(call: str, key: str) -> None:
            if call == "create" and "/log/" in key:
                objects[1].remove(key.replace("0003", "0002"))

        objects[0].before = bring_back
        with pytest.raises(StoreChangedError):
            one.put_alias("best", [Target("sql", 1)])
        assert [each.key[-1] for each in objects[1].under("") if "/log/" in each.key] == ["1"]
        objects[0].come_back()


class DiedError(BaseException):
    """Nothing is undone by who is killed."""


def test_what_was_half_taken_over_when_a_server_died_is_taken_over_whole(
    objects: list[Disturbed], files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The description of the later of two changes was written, that of the one before it was not."""

    def die(*_arguments: object) -> None:
        raise DiedError

    with replicas(tmp_path, objects[:1]) as (one,):
        put(one, "sql", files[0])
        with closing(SharedStore(tmp_path / "other", objects[1], BASE)) as other:
            one.put_alias("best", [Target("sql", 1)])
            put(one, "tales", files[1])
            entries, _ = other.unread(other.revision)
            assert len(entries) == 2
            with monkeypatch.context() as patch:
                patch.setattr(other._aliases, "put", die)  # noqa: SLF001
                patch.setattr(other._names, "_undo", lambda _error: None)  # noqa: SLF001
                with pytest.raises(DiedError):
                    other.catch_up(entries)
        with closing(SharedStore(tmp_path / "other", objects[1], BASE)) as other:
            assert (other.names(), [alias.alias for alias in other.aliases()]) == (["sql", "tales"], ["best"])
            assert other.revision == one.revision


def test_what_stands_before_a_bucket_does_not_say_what_is_in_it(bucket: str) -> None:
    objects = open_objects(bucket)
    assert isinstance(objects, BucketObjects)
    assert objects.get("key") is None
    with Stubber(objects._small) as stub:  # noqa: SLF001
        stub.add_client_error("get_object", "404", http_status_code=404)
        with pytest.raises(StoreUnreachableError):
            objects.get("key")


@pytest.mark.parametrize("address", ["s3://", "s3:///team", "s3://key:secret@bucket", "s3://bucket?x"])
def test_an_address_that_names_no_bucket_is_refused(address: str) -> None:
    with pytest.raises(StoreError, match="s3://BUCKET/PREFIX"):
        open_objects(address)


def test_a_store_without_what_it_was_founded_with_starts_no_server(
    objects: list[Disturbed], files: list[Path], tmp_path: Path
) -> None:
    alone = local(tmp_path / "data0")
    put(alone, "sql", files[0])
    alone.close()
    registry(tmp_path / "data0", objects[0]).close()
    [snapshot] = [each.key for each in objects[0].under("") if "/snapshots/" in each.key]
    objects[0].remove(snapshot)
    with pytest.raises(StoreUnreachableError, match="lost its snapshots"):
        registry(tmp_path / "data1", objects[1])


def test_a_folder_that_may_not_be_read_is_not_an_empty_one(tmp_path: Path) -> None:
    objects = open_objects(str(tmp_path / "shared"))
    assert objects.under("x/y/") == []
    objects.create("x/y/1", b"")
    (tmp_path / "shared").rename(tmp_path / "gone")
    with pytest.raises(StoreUnreachableError):
        objects.under("x/y/")


def test_what_others_have_removed_is_forgotten_and_nothing_else(
    objects: list[Disturbed], files: list[Path], tmp_path: Path
) -> None:
    with replicas(tmp_path, objects) as (one, other):
        for name, number in (("a", 0), ("b", 0), ("c", 1)):
            put(one, name, files[number])
        see(other)
        one.delete("a")
        one.delete("c")
        see(other)
        assert places(one) == places(other)
        known = [{digest for digest, *_ in store_of(of)._catalogue.blobs()} for of in (one, other)]  # noqa: SLF001
        assert known == [{one.card("b").record.digest}] * 2
