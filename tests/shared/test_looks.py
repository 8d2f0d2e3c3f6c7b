"""How a server looks for what others have changed, and what goes on where it cannot."""

import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from changer import BASE, publish
from replicas import Disturbed, put, registry, replicas, see
from swaplora_adapters.errors import AdapterError, StoppingError, StoreUnreachableError
from swaplora_adapters.registry import changes as registry_changes
from swaplora_adapters.registry.changes import Changes
from swaplora_adapters.store.records import Alias, Target
from swaplora_adapters.store.shared.address import open_objects
from swaplora_adapters.store.shared.history import log as shared_log
from swaplora_adapters.store.shared.store import SharedStore

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
