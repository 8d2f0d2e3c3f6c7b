"""How a server looks for what others have changed, and what goes on where it cannot."""

import shutil
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from changer import BASE, publish
from replicas import Disturbed, facts, put, registry, replicas, see, see_at_last, store_of
from swaplora_adapters.errors import (
    AdapterError,
    StoppingError,
    StorageFailedError,
    StoreChangedError,
    StoreUnreachableError,
)
from swaplora_adapters.files.disk import StoreError
from swaplora_adapters.registry import changes as registry_changes
from swaplora_adapters.registry.changes import Changes
from swaplora_adapters.store.records import Alias, Target
from swaplora_adapters.store.shared import heard
from swaplora_adapters.store.shared.address import open_objects
from swaplora_adapters.store.shared.history import compaction, segments
from swaplora_adapters.store.shared.history import log as shared_log
from swaplora_adapters.store.shared.history.entry import Position
from swaplora_adapters.store.shared.store import SharedStore
from swaplora_adapters.store.shared.trying import decoded, encoded

HANG_SECONDS = 60  # unless the test comes to its end


@pytest.fixture
def disturbed(tmp_path: Path) -> list[Disturbed]:
    (tmp_path / "shared").mkdir(exist_ok=True)
    return [Disturbed(open_objects(str(tmp_path / "shared"))) for _ in range(2)]


def test_a_look_is_one_call_and_one_more_for_each_change(
    tmp_path: Path, disturbed: list[Disturbed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_log, "TRUST_SECONDS", 3600.0)
    stores = [SharedStore(tmp_path / f"data{number}", each, BASE) for number, each in enumerate(disturbed)]
    with closing(stores[0]) as one, closing(stores[1]) as other:
        changes = Changes(other, lambda _touched: None)
        for number in range(3):
            for _ in range(number):
                publish(one, Changes(one, lambda _touched: None), "sql", f"{time.monotonic()}".encode())
            before = disturbed[1].num_calls
            changes.look()
            assert disturbed[1].num_calls - before == number + 1
            assert other.revision == one.revision


def test_an_alias_and_what_it_leads_to_change_together(
    files: list[Path], tmp_path: Path, disturbed: list[Disturbed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks in the middle of it, which takes long here, is never told that there is nothing."""
    with replicas(tmp_path, disturbed) as (one, other):
        put(one, "sql", files[0])
        put(one, "sql", files[1])
        one.put_alias("best", [Target("sql@1", 1)])
        see(other)
        put_name, read_aliases = other.names.index.put, other._store.aliases  # noqa: SLF001

        def slow_put(*arguments: object) -> None:
            put_name(*arguments)  # type: ignore[arg-type]
            time.sleep(0.1)

        def slow_aliases(alias: str | None = None) -> list[Alias]:
            time.sleep(0.1)
            return read_aliases(alias)

        with other.names.changes:
            monkeypatch.setattr(other.names.index, "put", slow_put)
            monkeypatch.setattr(other._store, "aliases", slow_aliases)  # noqa: SLF001
            one.put_alias("best", [Target("sql@2", 1)])
            one.delete("sql", 1)
        seen, versions = other.seen(), set()
        while not seen.done():
            lease = other.lease("best")
            versions.add(lease.record.version)
            lease.release()
        assert versions <= {1, 2}
        assert other.lease("best").record.version == 2


def test_a_folder_that_is_not_mounted_for_a_moment_fails_no_adapter_for_good(
    files: list[Path], tmp_path: Path, disturbed: list[Disturbed]
) -> None:
    with replicas(tmp_path, disturbed) as (one, other):
        digest = put(one, "sql", files[0]).record.digest
        see(other)
        (tmp_path / "shared").rename(tmp_path / "gone")
        refused = other.lease_weights([other.lease("sql")])
        with pytest.raises(StoreUnreachableError):
            refused.weights.result(HANG_SECONDS)
        refused.release()
        (tmp_path / "gone").rename(tmp_path / "shared")
        while other.names.changes.failure is not None:
            time.sleep(0.05)
        loaded = other.lease_weights([other.lease("sql")])
        assert [*loaded.weights.result(HANG_SECONDS)] == [digest]
        loaded.release()


def test_while_the_store_hangs_changes_are_refused_and_the_server_can_be_closed(
    files: list[Path], tmp_path: Path, disturbed: list[Disturbed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the one that hangs, of which it cannot be known whether it is made."""
    monkeypatch.setattr(registry_changes, "HANGING_SECONDS", 0.2)
    monkeypatch.setattr(registry_changes, "HOLD_SECONDS", 0.1)
    is_over = threading.Event()
    of = registry(tmp_path / "data", disturbed[0])
    put(of, "sql", files[0])
    before = of.revision
    told: list[AdapterError] = []

    def hang(_call: str, _key: str) -> None:
        is_over.wait(HANG_SECONDS)

    def change(number: int) -> None:
        try:
            of.put_alias(f"a{number}", [Target("sql", 1)])
        except AdapterError as error:
            told.append(error)

    disturbed[0].before = hang
    threads = [threading.Thread(target=change, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        while len(told) < 3:
            time.sleep(0.01)
            assert not is_over.is_set()
        assert {type(error) for error in told} == {StoreUnreachableError}
        with pytest.raises(StoreUnreachableError):
            of.seen().result(0)
        of._cleaner.submit(of._finish_removals)  # noqa: SLF001
        closing_thread = threading.Thread(target=of.close)
        closing_thread.start()
        closing_thread.join(HANG_SECONDS / 2)
        assert not closing_thread.is_alive()
        assert of.names.changes.is_hanging  # the process is not to wait for it either
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert of.revision == before


@pytest.mark.parametrize("call", ["under", "get"])
@pytest.mark.parametrize("long_seconds", [0.0, 3600.0])
def test_a_store_that_hangs_as_a_snapshot_is_read_is_found_to(
    files: list[Path],
    tmp_path: Path,
    disturbed: list[Disturbed],
    monkeypatch: pytest.MonkeyPatch,
    long_seconds: float,
    call: str,
) -> None:
    """By a server that slept since before the log was cut. Large ones are waited for longer than what is small."""
    monkeypatch.setattr(segments, "SEGMENT", 2)
    monkeypatch.setattr(registry_changes, "TIDY_SECONDS", 3600.0)
    monkeypatch.setattr(registry_changes, "HANGING_SECONDS", 0.2)
    monkeypatch.setattr(heard, "LONG_SECONDS", long_seconds)
    has_begun, is_over = threading.Event(), threading.Event()

    def hang(each: str, key: str) -> None:
        if each == call and "/snapshots/" in key:
            has_begun.set()
            is_over.wait(HANG_SECONDS)

    with replicas(tmp_path, disturbed) as (one, other), ExitStack() as stack:
        with other.names.changes:  # it sleeps
            monkeypatch.setattr(compaction, "GRACE_SECONDS", -1.0)
            for number in range(9):
                put(one, f"a{number}", files[number % 5])
                store_of(one).tidy()
                store_of(one).tidy()
            monkeypatch.setattr(shared_log, "TRUST_SECONDS", -1.0)
            disturbed[1].before = hang
            stack.callback(is_over.set)
        other.seen()
        assert has_begun.wait(HANG_SECONDS)
        if long_seconds:
            assert (store_of(other).asked_at or 0.0) > time.monotonic()  # as it will be late, not as it was asked
            assert not other.names.changes.is_hanging
        else:
            deadline = time.monotonic() + HANG_SECONDS / 2
            while not other.names.changes.is_hanging:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            with pytest.raises(StoreUnreachableError, match="does not answer"):
                put(other, "late", files[0])
            with pytest.raises(StoreUnreachableError):
                other.seen().result(0)
        is_over.set()
        see_at_last(other)
        assert facts(other) == facts(one)


def test_what_is_heard_after_the_end_is_not_taken_over(tmp_path: Path, disturbed: list[Disturbed]) -> None:
    """By then the directory may be another process's."""
    one, other = (SharedStore(tmp_path / f"data{number}", each, BASE) for number, each in enumerate(disturbed))
    with closing(one):
        publish(one, Changes(one, lambda _touched: None), "sql", b"1")
        entries, is_all = other.unread(0)
        assert (len(entries), is_all) == (1, True)
        other.close()
        with pytest.raises(StoppingError):
            other.catch_up(entries)
        assert not [*(tmp_path / "data1" / "names").iterdir()]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (StoreError("a snapshot was written by a newer release"), "a snapshot was written by a newer release"),
        (KeyError("names"), "KeyError"),
    ],
)
def test_whoever_asks_while_nobody_knows_what_is_wrong_is_told_that_the_store_is(
    files: list[Path], tmp_path: Path, disturbed: list[Disturbed], error: Exception, told: str
) -> None:
    """As for all else that is wrong with it, so that no request fails by what nobody foresaw; the report says more."""
    reported = list[Exception]()

    def fail(_call: str, key: str) -> None:
        if "/log/" in key:
            raise error

    with replicas(tmp_path, disturbed, report=reported.append) as (_, other):
        disturbed[1].before = fail
        asked = other.seen()
        with pytest.raises(StoreChangedError if isinstance(error, StoreError) else StorageFailedError, match=told):
            asked.result(HANG_SECONDS)
        assert told in str(reported[0])
        disturbed[1].come_back()


class Restored:
    """A shared folder that is brought back as it was when it was backed up."""

    def __init__(self, folder: Path) -> None:
        self.shared, self._backup = folder / "shared", folder / "backup"

    def back_up(self) -> None:
        shutil.copytree(self.shared, self._backup)

    def bring_back(self) -> None:
        shutil.rmtree(self.shared)
        shutil.copytree(self._backup, self.shared)

    @property
    def changes(self) -> list[int]:
        return sorted(int(each.name) for each in self.shared.glob("*/log/*"))

    def forget_order(self) -> None:
        """As an earlier release has written it."""
        for path in self.shared.glob("*/log/*"):
            [told] = decoded(path.read_bytes(), path.name)
            del told["after"]
            path.write_bytes(encoded(told))


@pytest.fixture
def restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Restored:
    """And nobody asks from time to time whether the store is the same: what is read has to say it."""
    monkeypatch.setattr(shared_log, "TRUST_SECONDS", 3600.0)
    monkeypatch.setattr(registry_changes, "TIDY_SECONDS", 3600.0)
    return Restored(tmp_path)


@pytest.mark.parametrize("is_told", [True, False])
def test_no_change_of_another_history_is_taken_over_though_that_is_longer_by_then(
    files: list[Path], tmp_path: Path, disturbed: list[Disturbed], restored: Restored, is_told: bool
) -> None:
    """Within the ten seconds; also where an earlier release has made it, which did not say what it follows."""
    with replicas(tmp_path, disturbed[:1]) as (one,):
        put(one, "sql", files[0])
        put(one, "tales", files[0])
        restored.back_up()
        put(one, "sql", files[1])
        see(one)
        known = facts(one)
        restored.bring_back()
        with replicas(tmp_path / "new", disturbed[1:]) as (new,):
            put(new, "tales", files[2])
            put(new, "tales", files[3])
            if not is_told:
                restored.forget_order()
            with pytest.raises(StoreChangedError):
                see(one)
            with pytest.raises(StoreChangedError):
                put(one, "late", files[4])
            assert facts(one) == known
            assert restored.changes == [1, 2, 3, 4]
            with pytest.raises(StoreChangedError):  # where memory knows less than the disk
                store_of(one).unread(2)
            if is_told:
                with pytest.raises(StoreUnreachableError):
                    store_of(one).catch_up(store_of(new)._log.after(Position(2, None), 8)[0])  # noqa: SLF001
            assert store_of(one).revision == 3


@pytest.mark.parametrize("is_killed", [False, True])
def test_what_is_made_in_a_store_that_was_just_brought_back_is_known_to_nobody(
    files: list[Path], tmp_path: Path, disturbed: list[Disturbed], restored: Restored, is_killed: bool
) -> None:
    """Between the making of it and its end; where its maker is killed there it holds up changes, and says where."""
    done: list[str] = []
    with replicas(tmp_path, disturbed) as (one, other):
        put(one, "sql", files[0])
        put(one, "tales", files[0])
        see(other)
        restored.back_up()
        put(one, "sql", files[1])
        restored.bring_back()
        put(other, "sql", files[2])
        known = facts(other)

        def meanwhile(call: str, key: str) -> None:
            if call == "create" and "/log/" in key:
                disturbed[0].come_back()
                see(other)
                assert facts(other) == known
                with pytest.raises(StoreUnreachableError, match="0004 in the shared store is a change of another"):
                    put(other, "late", files[4])
                done.append(key)
                if is_killed:
                    disturbed[0].vanish()

        disturbed[0].after = meanwhile
        with pytest.raises(StoreUnreachableError if is_killed else StoreChangedError):
            put(one, "lost", files[3])
        assert len(done) == 1
        if is_killed:
            with replicas(tmp_path / "new", [open_objects(str(restored.shared))]) as (new,):
                assert facts(new) == known
            assert restored.changes == [1, 2, 3, 4]
            disturbed[1].remove(done[0])
        assert restored.changes == [1, 2, 3]
        put(other, "late", files[4])
        with replicas(tmp_path / "newer", [open_objects(str(restored.shared))]) as (new,):
            assert facts(new) == facts(other)
            assert set(facts(new)) == {"sql", "tales", "late"}


def test_a_snapshot_of_another_history_is_what_no_server_and_no_snapshot_begins_with(
    files: list[Path], tmp_path: Path, disturbed: list[Disturbed], restored: Restored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came to the store after that was brought back. Once the log shows it to be another's it is passed over."""
    monkeypatch.setattr(segments, "SEGMENT", 4)
    told: list[Exception] = []
    with replicas(tmp_path, disturbed[:1]) as (one,):
        put(one, "sql", files[0])
        put(one, "tales", files[0])
        restored.back_up()
        put(one, "lost", files[1])
        put(one, "lost", files[2])
        store_of(one).tidy()
    [snapshot] = restored.shared.glob("*/snapshots/*")
    late = snapshot.read_bytes()
    restored.bring_back()
    monkeypatch.setattr(registry_changes, "TIDY_SECONDS", 0.01)
    with replicas(tmp_path / "new", disturbed[1:], report=told.append) as (new,):
        put(new, "n", files[3])
        snapshot.parent.mkdir(exist_ok=True)
        snapshot.write_bytes(late)
        with pytest.raises(StoreError, match=f"{snapshot.name}, a snapshot in the shared store, is not of its log"):
            registry(tmp_path / "newer", open_objects(str(restored.shared)))
        for number in range(5):
            put(new, f"n{number}", files[3])
        deadline = time.monotonic() + HANG_SECONDS
        while not told:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with replicas(tmp_path / "newest", [open_objects(str(restored.shared))]) as (newest,):
            assert facts(newest) == facts(new)
    assert f"{snapshot.name}, a snapshot in the shared store, is not of its log" in str(told[0])
    assert [each.name[:20] for each in snapshot.parent.iterdir()] == ["00000000000000000008"]
