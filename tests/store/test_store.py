"""The store keeps what it acknowledged, whole, through kills, full disks and damage, and nothing else."""

import errno
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from adapter_files import config_bytes
from crash import everything, without_catalogue
from soak import size
from swaplora_adapters.config.parse import parse_spec
from swaplora_adapters.errors import (
    AdapterError,
    AdapterFailedError,
    AdapterNotFoundError,
    AdapterTooLargeError,
    AliasNotFoundError,
    GateFailedError,
    InvalidAdapterError,
    InvalidAdapterNameError,
    PreconditionFailedError,
    StorageFullError,
    VersionNotFoundError,
)
from swaplora_adapters.files.digest import digest_of
from swaplora_adapters.files.disk import StoreError, raising_storage_errors
from swaplora_adapters.store.catalogue import Catalogue
from swaplora_adapters.store.conditions import Conditions, NameState
from swaplora_adapters.store.records import Alias, Canary, Details, Mixing, Published, Standing, Target
from swaplora_adapters.store.schema import MIGRATIONS
from swaplora_adapters.store.staging import Staging
from swaplora_adapters.store.store import Store

Disturb = Callable[[Path], object]


def fill(staging: Staging, config: bytes, weights: bytes) -> None:
    with staging.writer("config", 1 << 20) as writer:
        writer.write(config)
    with staging.writer("weights", 1 << 20) as writer:
        writer.write(weights)


def publish(
    store: Store,
    name: str,
    weights: bytes,
    config: bytes = config_bytes(),
    *,
    source: str = "upload",
    origin: str | None = None,
    **conditions: Any,
) -> Published:
    """Publish weights of any bytes at all: the store does not look into them."""
    with store.stage() as staging:
        fill(staging, config, weights)
        digest = digest_of(parse_spec(config_bytes()).canonical, staging.weights_path)
        details = Details(digest, 4, ("q_proj", "v_proj"), "base", 32, ("a warning",))
        made = Conditions(**conditions)
        return store.publish(name, staging, details, source=source, conditions=made, origin=origin)


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_arguments: object) -> None:
        raise error

    return fail


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def store(data_dir: Path) -> Iterator[Store]:
    opened = Store(data_dir)
    yield opened
    opened.check_integrity()
    assert list((data_dir / "staging").iterdir()) == []
    opened.close()


def test_a_published_version_is_described_and_found_again(data_dir: Path) -> None:
    store = Store(data_dir)
    record, is_new, previous = publish(store, "sql", b"weights", source="hf://org/sql")
    assert (is_new, previous, record.version, record.failure) == (True, None, 1, None)
    assert (record.rank, record.targets, record.base_model) == (4, ("q_proj", "v_proj"), "base")
    assert (record.source, record.warnings) == ("hf://org/sql", ("a warning",))
    assert record.nbytes == len(b"weights") + len(config_bytes())
    store.close()
    again = Store(data_dir)
    assert again.current("sql") == record
    assert again.quarantined == []
    assert again.blob_paths(record.digest).weights.read_bytes() == b"weights"
    again.verify(record.digest)
    again.close()


def test_versions_count_and_the_same_bytes_make_none(store: Store) -> None:
    first = publish(store, "sql", b"one").record
    assert publish(store, "sql", b"one") == (first, False, first)
    second = publish(store, "sql", b"two")
    assert (second.record.version, second.is_new, second.previous) == (2, True, first)
    third = publish(store, "sql", b"one").record
    assert (third.version, third.digest) == (3, first.digest)
    assert [record.version for record in store.versions("sql")] == [1, 2, 3]


def test_the_same_bytes_under_two_names_are_stored_once(store: Store, data_dir: Path) -> None:
    digests = {publish(store, name, b"same").record.digest for name in ("b", "a")}
    assert len(digests) == len(list((data_dir / "blobs").iterdir())) == 1
    assert store.names() == ["a", "b"]


def test_the_same_adapter_written_differently_leaves_the_stored_files_alone(
    store: Store, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = publish(store, "a", b"same").record
    paths = store.blob_paths(first.digest)
    before = paths.config.stat()
    spaced = b"  " + config_bytes()
    assert publish(store, "b", b"same", spaced).record.digest == first.digest
    with monkeypatch.context() as patch:
        patch.setattr(Catalogue, "add_version", raising(StorageFullError("full")))
        with pytest.raises(StorageFullError):
            publish(store, "c", b"same", spaced)
    after = paths.config.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    paths.weights.write_bytes(b"SAME")  # damaged, and nobody has noticed yet
    publish(store, "d", b"same", spaced)
    store.verify(first.digest)
    assert paths.config.read_bytes() == spaced


def test_lookups(store: Store) -> None:
    first, second = publish(store, "sql", b"one").record, publish(store, "sql", b"two").record
    assert [store.version("sql", 1), store.version("sql", 2)] == [first, second]
    with pytest.raises(VersionNotFoundError):
        store.version("sql", 9)
    unknown: list[Callable[[str], object]] = [store.current, store.versions, store.delete]
    for lookup in unknown:
        with pytest.raises(AdapterNotFoundError):
            lookup("nosql")


def test_preconditions(store: Store) -> None:
    with pytest.raises(PreconditionFailedError):
        publish(store, "sql", b"one", if_match="sha256:" + "0" * 64)
    first = publish(store, "sql", b"one", if_none_match=True).record
    for content in (b"one", b"two"):
        with pytest.raises(PreconditionFailedError):
            publish(store, "sql", content, if_none_match=True)
    second = publish(store, "sql", b"two", if_match=first.digest).record
    with pytest.raises(PreconditionFailedError):
        publish(store, "sql", b"three", if_match=first.digest)
    assert store.current("sql") == second


def test_what_changed_since_it_was_looked_at_is_not_replaced(store: Store) -> None:
    never_used = NameState(was_used=False, version=None)
    first = publish(store, "sql", b"one", if_unchanged_since=never_used).record
    seen = NameState(was_used=True, version=first.version)
    store.change("sql", is_pinned=True)
    second = publish(store, "sql", b"two", if_unchanged_since=seen).record
    for since in (never_used, seen):
        with pytest.raises(PreconditionFailedError, match="sql was changed in the meantime"):
            publish(store, "sql", b"three", if_unchanged_since=since)
    assert store.current("sql") == second
    store.delete("sql")
    for since in (never_used, NameState(was_used=True, version=second.version)):
        with pytest.raises(PreconditionFailedError):
            publish(store, "sql", b"three", if_unchanged_since=since)
    assert publish(store, "sql", b"three", if_unchanged_since=NameState(True, None)).record.version == 3


def test_a_refused_publish_leaves_no_files(store: Store, data_dir: Path) -> None:
    publish(store, "sql", b"one")
    with pytest.raises(PreconditionFailedError):
        publish(store, "sql", b"two", if_none_match=True)
    assert len(list((data_dir / "blobs").iterdir())) == 1


@pytest.mark.parametrize("name", ["", ".x", "-x", "a/b", "a b", "a\n", "\u0430", "x" * 129, "..", "a\0", "a@1", "a:b"])
def test_names_that_are_refused(store: Store, name: str) -> None:
    with pytest.raises(InvalidAdapterNameError):
        publish(store, name, b"one")


def test_names_that_look_alike_are_kept_apart(store: Store) -> None:
    names = ["foo", "foobar", "lora", "default", "a.b", "a-b", "A", "a", "0", "x" * 128]
    for name in names:
        publish(store, name, name.encode())
    assert store.names() == sorted(names)
    store.delete("foo")
    assert [store.current(name).name for name in names[1:]] == names[1:]


def test_rolling_back(store: Store) -> None:
    publish(store, "sql", b"one")
    publish(store, "sql", b"two")
    store.change("sql", current=1)
    assert store.current("sql") == store.version("sql", 1)
    assert publish(store, "sql", b"two").record.version == 3
    with pytest.raises(VersionNotFoundError):
        store.change("sql", current=7, is_pinned=True)
    assert not store.is_pinned("sql")


def test_pins_shares_origins_and_aliases_survive_a_restart(data_dir: Path) -> None:
    store = Store(data_dir)
    for name in ("sql", "json"):
        publish(store, name, b"one")
    store.change("sql", is_pinned=True, shared_with=["acme"])
    assert not publish(store, "sql", b"one", origin="a folder").is_new
    canary = Alias("canary", (Target("sql", 90), Target("json@1", 10)))
    store.put_alias(Alias("canary", (Target("sql", 1),)))
    store.put_alias(canary)
    store.close()
    again = Store(data_dir)
    assert (again.is_pinned("sql"), again.is_pinned("json"), again.is_pinned("nosql")) == (True, False, False)
    assert (again.shared_with("sql"), again.shared_with("json")) == (("acme",), ())
    assert again.origins() == {"sql": "a folder", "json": None}
    assert again.aliases() == [canary]
    again.delete("sql")
    publish(again, "sql", b"two")
    assert not again.is_pinned("sql")  # it was the deleted adapter that was pinned
    assert again.shared_with("sql") == ()  # and shared
    assert again.origins()["sql"] == "a folder"
    again.remove_alias("canary")
    with pytest.raises(AliasNotFoundError):
        again.remove_alias("canary")
    again.check_integrity()
    again.close()


DIGEST = "sha256:" + "0" * 64


def make_first_schema(data_dir: Path) -> None:
    """What a first release left: an adapter called sql, and a catalogue without pins, aliases, kinds and revisions."""
    (data_dir / "blobs" / ("0" * 64)).mkdir(parents=True)
    connection = sqlite3.connect(data_dir / "catalogue.sqlite3")
    connection.executescript(f"{MIGRATIONS[0]}; PRAGMA user_version = 1")
    connection.execute("INSERT INTO blobs VALUES (?, 1, 1, NULL)", (DIGEST,))
    connection.execute("INSERT INTO names VALUES ('sql', 1, 1)")
    connection.execute(
        "INSERT INTO versions VALUES ('sql', 1, ?, 4, '[\"q\"]', NULL, 10, 1.5, 'upload', '[]')", (DIGEST,)
    )
    connection.commit()
    connection.close()


def test_a_catalogue_of_the_first_schema_is_brought_up_to_date(data_dir: Path) -> None:
    make_first_schema(data_dir)
    store = Store(data_dir)
    record = store.current("sql")
    assert (record.version, record.targets, record.kinds, record.created) == (1, ("q",), ("lora",), 1.5)
    assert not store.is_pinned("sql")
    assert store.aliases() == []
    store.close()


def test_deleting_versions(store: Store) -> None:
    for content in (b"one", b"two", b"three"):
        publish(store, "sql", content)
    assert [record.version for record in store.delete("sql", 3)] == [3]
    assert store.current("sql").version == 2
    store.delete("sql", 1)
    assert store.current("sql").version == 2
    store.delete("sql", 2)
    assert store.names() == []


def test_a_version_number_never_means_two_things(store: Store) -> None:
    publish(store, "sql", b"one")
    publish(store, "sql", b"two")
    store.delete("sql")
    assert publish(store, "sql", b"three", if_none_match=True).record.version == 3


def test_files_go_when_nothing_refers_to_them(store: Store, data_dir: Path) -> None:
    digest = publish(store, "a", b"same").record.digest
    publish(store, "b", b"same")
    store.delete("a")
    assert not store.discard_unreferenced(digest)
    store.delete("b")
    assert store.blob_paths(digest).weights.exists()
    assert store.discard_unreferenced(digest)
    assert list((data_dir / "blobs").iterdir()) == []
    assert publish(store, "a", b"same").is_new


def test_files_left_by_a_delete_are_swept_at_the_next_start(data_dir: Path) -> None:
    store = Store(data_dir)
    publish(store, "a", b"one")
    store.delete("a")
    store.close()
    Store(data_dir).close()
    assert list((data_dir / "blobs").iterdir()) == []


def test_concurrent_publishes_all_count(store: Store) -> None:
    threads = [threading.Thread(target=publish, args=(store, "sql", bytes([i]))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [record.version for record in store.versions("sql")] == [*range(1, 9)]


def test_one_process_at_a_time(data_dir: Path, store: Store) -> None:
    with pytest.raises(StoreError, match="in use by another process"):
        Store(data_dir)
    assert store.names() == []


def test_the_writer_counts_and_refuses(store: Store) -> None:
    with store.stage() as staging:
        with staging.writer("weights", max_bytes=5) as writer:
            writer.write(b"abc")
            writer.write(memoryview(b"de"))
        assert writer.num_bytes == 5
        with pytest.raises(InvalidAdapterError, match="was sent twice"):
            staging.writer("weights", max_bytes=5)
        with pytest.raises(AdapterTooLargeError), staging.writer("config", max_bytes=5) as writer:
            writer.write(b"abcdef")
    assert not staging.path.exists()


def test_a_missing_part_is_refused(store: Store) -> None:
    details = Details("sha256:" + "0" * 64, 1, (), None, 1, ())
    with store.stage() as staging, pytest.raises(InvalidAdapterError, match="must both be sent"):
        store.publish("sql", staging, details)
    assert store.names() == []


DAMAGE: dict[str, Disturb] = {
    "truncated": lambda folder: os.truncate(folder / "adapter_model.safetensors", 3),
    "unlinked": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "config unlinked": lambda folder: (folder / "adapter_config.json").unlink(),
    "folder gone": shutil.rmtree,
    "linked elsewhere": lambda folder: link_to(folder / "adapter_model.safetensors", Path("/etc/passwd")),
    "a folder": lambda folder: replace_by_folder(folder / "adapter_model.safetensors"),
}
SUBTLE_DAMAGE: dict[str, Disturb] = {
    "overwritten": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"WEIGHTS"),
    "config changed": lambda folder: (folder / "adapter_config.json").write_bytes(config_bytes().replace(b"9", b"8")),
}


def link_to(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_found_at_the_start_and_named(data_dir: Path, damage: Disturb) -> None:
    store = Store(data_dir)
    broken = publish(store, "broken", b"weights").record
    sound = publish(store, "sound", b"other").record
    damage(store.blob_paths(broken.digest).config.parent)
    store.close()
    store = Store(data_dir)
    [(name, version, reason)] = store.quarantined
    assert (name, version) == ("broken", 1)
    assert store.current("broken").failure == reason
    assert str(data_dir) not in reason
    with pytest.raises(AdapterFailedError):
        store.verify(broken.digest)
    store.verify(sound.digest)
    store.check_integrity()
    store.close()


@pytest.mark.parametrize("damage", (DAMAGE | SUBTLE_DAMAGE).values(), ids=(DAMAGE | SUBTLE_DAMAGE).keys())
def test_damage_is_found_before_a_load_and_mended_by_the_same_bytes(
    store: Store, data_dir: Path, damage: Disturb
) -> None:
    record = publish(store, "sql", b"weights").record
    damage(store.blob_paths(record.digest).config.parent)
    with pytest.raises(AdapterFailedError):
        store.verify(record.digest)
    assert store.current("sql").failure is not None
    assert not publish(store, "sql", b"weights").is_new
    store.verify(record.digest)
    assert store.current("sql") == record


def test_a_failed_version_can_be_deleted(store: Store) -> None:
    record = publish(store, "sql", b"weights").record
    store.blob_paths(record.digest).weights.unlink()
    with pytest.raises(AdapterFailedError):
        store.verify(record.digest)
    store.delete("sql")
    assert store.discard_unreferenced(record.digest)


def failing(call: str, code: int, after: int) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        real, calls = getattr(os, call), iter(range(10_000))

        def fake(*args: Any, **kwargs: Any) -> Any:
            if next(calls) >= after:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, call, fake)

    return plant


FAULTS = [(call, 0) for call in ("mkdir", "rename", "link", "replace")]
FAULTS += [("write", n) for n in range(3)] + [("fsync", n) for n in range(5)]


@pytest.mark.parametrize(("call", "after"), FAULTS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_fault_at_any_call_leaves_the_store_as_it_was(
    store: Store, data_dir: Path, monkeypatch: pytest.MonkeyPatch, call: str, after: int, code: int
) -> None:
    before = publish(store, "sql", b"one").record
    described = (data_dir / "names" / "sql").read_bytes()
    with monkeypatch.context() as patch:
        failing(call, code, after)(patch)
        with pytest.raises(OSError) as caught:  # noqa: PT011 - which kind is the next line's matter
            publish(store, "sql", b"two")
    assert isinstance(caught.value, StorageFullError) == (code != errno.EIO)
    assert store.versions("sql") == [before]
    assert len(list((data_dir / "blobs").iterdir())) == 1
    assert (data_dir / "names" / "sql").read_bytes() == described
    assert publish(store, "sql", b"two").is_new


def test_a_full_catalogue_is_told_as_a_full_disk() -> None:
    connection = sqlite3.connect(":memory:")
    connection.execute("PRAGMA max_page_count = 2")
    with pytest.raises(StorageFullError), raising_storage_errors():
        connection.executescript("CREATE TABLE a (x); CREATE TABLE b (x); CREATE TABLE c (x)")
    with pytest.raises(sqlite3.OperationalError), raising_storage_errors():
        connection.execute("SELECT nonsense")
    connection.close()


def test_delete_works_on_a_full_disk(store: Store, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = publish(store, "sql", b"one").record.digest
    real = Catalogue.remove_versions

    def remove_version(self: Catalogue, record: Any) -> None:
        if (data_dir / "reserve").exists():
            raise StorageFullError("full")
        real(self, record)

    monkeypatch.setattr(Catalogue, "remove_versions", remove_version)
    store.delete("sql")
    assert store.names() == []
    assert store.discard_unreferenced(digest)
    assert (data_dir / "reserve").stat().st_size > 0


PUBLISHER = """
import os, signal, sys
from pathlib import Path
from swaplora_adapters.files.digest import digest_of
from swaplora_adapters.config.parse import parse_spec
from swaplora_adapters.store.records import Details
from swaplora_adapters.store.store import Store

data_dir, config, first, die_at = Path(sys.argv[1]), sys.argv[2].encode(), int(sys.argv[3]), int(sys.argv[4])
assert "torch" not in sys.modules
store = Store(data_dir)
calls = 0

def deadly(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call

for name in ("mkdir", "open", "write", "fsync", "rename", "link", "replace", "unlink", "close"):
    setattr(os, name, deadly(getattr(os, name)))

for number in range(first, first + (1 if die_at else 1000)):
    with store.stage() as staging:
        for part, content in (("config", config), ("weights", b"%d" % number)):
            with staging.writer(part, 1 << 20) as writer:
                writer.write(content)
        digest = digest_of(parse_spec(config).canonical, staging.weights_path)
        record = store.publish(f"n{number % 3}", staging, Details(digest, 1, (), None, 1, ())).record
        print(record.name, record.version, record.digest, flush=True)
"""


def start_publisher(data_dir: Path, first: int, die_at: int) -> "subprocess.Popen[str]":
    arguments = [str(data_dir), config_bytes().decode(), str(first), str(die_at)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [sys.executable, "-c", PUBLISHER, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )


def assert_whole(data_dir: Path, acknowledged: list[str]) -> None:
    """Every acknowledged version is there, and whatever is there is whole; the same where the catalogue is lost."""
    copy = without_catalogue(data_dir, data_dir.with_name("copy"))
    with closing(Store(copy)) as rebuilt:
        known = everything(rebuilt)
    shutil.rmtree(copy)
    store = Store(data_dir)
    assert everything(store) == known
    assert store.quarantined == []
    assert list((data_dir / "staging").iterdir()) == []
    for line in acknowledged:
        name, version, digest = line.split()
        assert store.version(name, int(version)).digest == digest
    for name in store.names():
        for record in store.versions(name):
            store.verify(record.digest)
    store.check_integrity()
    store.close()


def test_what_was_acknowledged_survives_sigkill_at_any_time(data_dir: Path) -> None:
    acknowledged: list[str] = []
    for round_number in range(5):
        with start_publisher(data_dir, first=1000 * round_number, die_at=0) as process:
            assert process.stdout is not None
            acknowledged += [process.stdout.readline() for _ in range(1 + 7 * round_number)]
            process.send_signal(signal.SIGKILL)
            acknowledged += [line for line in process.stdout if line.endswith("\n")]
        assert_whole(data_dir, acknowledged)


def test_sigkill_at_every_call_leaves_a_version_whole_or_absent(data_dir: Path) -> None:
    acknowledged: list[str] = []
    for die_at in range(1, 100):
        with start_publisher(data_dir, first=die_at, die_at=die_at) as process:
            output, _ = process.communicate()
        acknowledged += output.splitlines()
        assert_whole(data_dir, acknowledged)
        if process.returncode == 0:
            break
    assert die_at > 10
    assert acknowledged


NAMES = st.sampled_from(["a", "ab", "b"])
CONTENTS = st.sampled_from([b"0", b"1", b"2"])


class StoreMachine(RuleBasedStateMachine):
    """The store against plain dictionaries: what it has under each name, with its catalogue and without."""

    folder: Path

    def __init__(self) -> None:
        super().__init__()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.store = Store(self.folder)
        self.versions: dict[str, dict[int, bytes]] = {}
        self.current: dict[str, int] = {}
        self.last: dict[str, int] = {}
        self.aliases: dict[str, Alias] = {}
        self.pinned: set[str] = set()
        self.shared_with: dict[str, tuple[str, ...]] = {}
        self.gated: set[str] = set()
        self.standings: dict[str, dict[int, Standing]] = {}
        self.put_back: set[tuple[str, int]] = set()
        self.backup = self.folder.with_name("backup")
        shutil.copy(self.folder / "catalogue.sqlite3", self.backup)

    @rule(name=NAMES, content=CONTENTS)
    def publish(self, name: str, content: bytes) -> None:
        published = publish(self.store, name, content)
        known, standings = self.versions.setdefault(name, {}), self.standings.setdefault(name, {})
        newest = max(known, default=0)
        is_held = name in self.gated and standings.get(newest) in (Standing.CANDIDATE, Standing.FAILED)
        is_held &= (name, newest) not in self.put_back
        same = [each for each in (self.current.get(name), newest if is_held else 0) if each and known[each] == content]
        for version, standing in standings.items() if same and same[0] == self.current[name] else ():
            if name in self.gated and standing is Standing.CANDIDATE and version > self.current[name]:
                standings[version] = Standing.FAILED
                self.put_back.add((name, version))
        assert published.is_new is not bool(same)
        if not same:
            self.last[name] = self.last.get(name, 0) + 1
            known[self.last[name]] = content
            if name in self.gated:
                standings[self.last[name]] = Standing.CANDIDATE
            else:
                self.current[name] = self.last[name]
        assert published.record.version == (same[0] if same else self.last[name])

    def let_pass(self, name: str) -> None:
        standings = self.standings.get(name, {})
        if name not in self.gated and standings.get(self.current[name]) is not Standing.PASSED:
            standings.pop(self.current[name], None)

    @rule(name=NAMES, version=st.none() | st.integers(1, 4))
    def delete(self, name: str, version: int | None) -> None:
        known = self.versions.get(name, {})
        doomed = [number for number in known if version in (None, number)]
        standings = self.standings.get(name, {})
        follow = [
            number
            for number in known.keys() - {*doomed}
            if name not in self.gated or standings.get(number) in (None, Standing.PASSED)
        ]
        try:
            removed = self.store.delete(name, version)
        except GateFailedError:
            assert not follow
            assert self.current[name] in doomed != [*known]
            return
        except AdapterError:
            removed = []
        assert [record.version for record in removed] == doomed
        for record in removed:
            del known[record.version]
            standings.pop(record.version, None)
            self.store.discard_unreferenced(record.digest)
        if not known:
            self.versions.pop(name, None)
            self.current.pop(name, None)
            self.gated.discard(name)
        elif self.current[name] not in known:
            self.current[name] = max(follow)
        if known:
            self.let_pass(name)

    @rule(name=NAMES, version=st.integers(1, 4))
    def roll_back(self, name: str, version: int) -> None:
        if version in self.versions.get(name, {}):
            self.store.change(name, current=version)
            self.current[name] = version
            self.let_pass(name)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = Store(self.folder)
        assert self.store.quarantined == []

    @rule(loss=st.sampled_from(["catalogue", "log", "main", "older"]))
    def loses_its_catalogue(self, loss: str) -> None:
        """As if it were killed now, and what it knew by heart were damaged as well."""
        copy = self.folder.with_name("killed")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder, copy)
        main, log = (copy / name for name in ("catalogue.sqlite3", "catalogue.sqlite3-wal"))
        if loss in ("catalogue", "main"):
            os.truncate(main, 0)
        if loss in ("catalogue", "log"):
            log.unlink(missing_ok=True)
        if loss == "older":
            shutil.copy(self.backup, main)
            log.unlink(missing_ok=True)
        with closing(Store(copy)) as rebuilt:
            assert everything(rebuilt) == everything(self.store)
            assert rebuilt.quarantined == []
            rebuilt.check_integrity()

    @rule()
    def backs_up(self) -> None:
        self.restart()
        shutil.copy(self.folder / "catalogue.sqlite3", self.backup)

    @rule(
        alias=st.sampled_from(["x", "y"]),
        leads_to=st.lists(st.tuples(NAMES, st.integers(1, 9)), max_size=2),
        mixing=st.sampled_from([None, Mixing(2, 0.5)]),
    )
    def point_alias(self, alias: str, leads_to: list[tuple[str, int]], mixing: Mixing | None) -> None:
        if leads_to:
            targets = (Target(name, weight if mixing is None else 1) for name, weight in leads_to)
            is_canary = len(leads_to) > 1 and mixing is None
            canary = Canary(leads_to[0][0], 0.5, 2, 60.0, leads_to[0][1], "why") if is_canary else None
            self.aliases[alias] = Alias(alias, tuple(targets), mixing, canary)
            self.store.put_alias(self.aliases[alias])
        elif self.aliases.pop(alias, None) is not None:
            self.store.remove_alias(alias)

    @rule(name=NAMES, is_pinned=st.booleans())
    def pin(self, name: str, is_pinned: bool) -> None:
        if name in self.current:
            self.store.change(name, is_pinned=is_pinned)
            self.pinned = self.pinned - {name} | ({name} if is_pinned else set())

    @rule(name=NAMES, tenants=st.lists(st.sampled_from(["a", "b"]), unique=True).map(tuple))
    def share(self, name: str, tenants: tuple[str, ...]) -> None:
        if name in self.current:
            self.store.change(name, shared_with=tenants)
            self.shared_with[name] = tenants

    @rule(name=NAMES, is_gated=st.booleans())
    def gate(self, name: str, is_gated: bool) -> None:
        if name in self.current:
            self.store.set_gate(name, "a gate" if is_gated else None)
            self.let_pass(name)
            self.gated = self.gated - {name} | ({name} if is_gated else set())
            self.let_pass(name)
            for version, standing in self.standings.get(name, {}).items():
                is_back = (name, version) in self.put_back
                if is_gated and standing is Standing.FAILED and version > self.current[name] and not is_back:
                    self.standings[name][version] = Standing.CANDIDATE

    @rule(name=NAMES, version=st.integers(1, 4), has_passed=st.booleans(), is_current=st.booleans())
    def judge(self, name: str, version: int, has_passed: bool, is_current: bool) -> None:
        if self.standings.get(name, {}).get(version) is Standing.CANDIDATE:
            standing = Standing.PASSED if has_passed else Standing.FAILED
            self.store.judge(name, version, standing, '{"reason": null}', is_current=is_current)
            self.standings[name][version] = standing
            if is_current:
                self.current[name] = version

    @invariant()
    def agrees(self) -> None:
        self.pinned &= self.current.keys()
        assert {name for name in self.current if self.store.is_pinned(name)} == self.pinned
        self.shared_with = {name: self.shared_with.get(name, ()) for name in self.current}
        assert {name: self.store.shared_with(name) for name in self.current} == self.shared_with
        assert self.store.aliases() == [alias for _, alias in sorted(self.aliases.items())]
        assert self.store.names() == sorted(self.versions)
        for name, known in self.versions.items():
            records = self.store.versions(name)
            contents = {r.version: self.store.blob_paths(r.digest).weights.read_bytes() for r in records}
            assert contents == known
            assert {r.version: r.standing for r in records if r.standing} == self.standings.get(name, {})
            assert (self.store.gate(name) is not None) == (name in self.gated)
            assert self.store.current(name).version == self.current[name]
        self.store.check_integrity()

    def teardown(self) -> None:
        self.store.close()


def test_the_store_behaves_like_dictionaries(tmp_path: Path) -> None:
    machine = type("Machine", (StoreMachine,), {"folder": tmp_path / "data"})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=size(ci=15, soak=300),
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
