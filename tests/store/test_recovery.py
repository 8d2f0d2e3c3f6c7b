"""Nothing acknowledged is lost with its catalogue: the files say what they are, and what nobody knows is set aside."""

import errno
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crash import everything
from swaplora_adapters.errors import AdapterFailedError, InvalidAdapterError, StorageFailedError, StorageFullError
from swaplora_adapters.files.digest import hex_of
from swaplora_adapters.files.disk import StoreError, raising_storage_errors
from swaplora_adapters.store import blobs, manifests
from swaplora_adapters.store.catalogue import Catalogue
from swaplora_adapters.store.manifests import Manifests
from swaplora_adapters.store.records import Alias, Mixing, Standing, Target, VersionRecord
from swaplora_adapters.store.store import Store
from test_store import link_to, publish, replace_by_folder

CATALOGUE, WAL = "catalogue.sqlite3", "catalogue.sqlite3-wal"
Damage = Callable[[Path], object]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


def fill(store: Store) -> None:
    """Something of all that can be done: replace, delete whole and in part, roll back, pin, take in, alias, judge."""
    for content in (b"one", b"two", b"three"):
        publish(store, "sql", content, source="hf://org/sql")
    store.change("sql", current=2, is_pinned=True, shared_with=("acme", "zeta"))
    [removed] = store.delete("sql", 3)
    store.discard_unreferenced(removed.digest)
    for name in ("json", "gone", "Gone"):
        publish(store, name, b"one")
    publish(store, "json", b"one", origin="a folder")
    publish(store, "gated", b"one")
    store.set_gate("gated", "a gate")
    for version, standing in ((2, Standing.PASSED), (3, Standing.FAILED), (4, None)):
        publish(store, "gated", str(version).encode())
        if standing is not None:
            is_current = standing is Standing.PASSED
            store.judge("gated", version, standing, json.dumps({"reason": None}), is_current=is_current)
    store.put_alias(Alias("canary", (Target("sql", 90), Target("json@1", 10))))
    store.put_alias(Alias("old", (Target("json", 1),)))
    store.put_alias(Alias("org/sql", (Target("sql", 1),)))
    publish(store, "gone", b"one", origin="a folder")
    store.delete("gone")
    store.remove_alias("old")


def filled(data_dir: Path) -> dict[str, Any]:
    """A data directory in which all that was acknowledged is in the catalogue's file; what it holds."""
    store = Store(data_dir)
    fill(store)
    found = everything(store)
    store.close()
    return found


def killed(data_dir: Path, *, had_before: bool = False) -> dict[str, Any]:
    """One that a kill left, where most is in the catalogue's log alone; what it holds."""
    alive = data_dir.with_name("alive")
    if had_before:
        store = Store(alive)
        publish(store, "before", b"before")
        publish(store, "sql", b"before")
        store.close()
    store = Store(alive)
    fill(store)
    found = everything(store)
    shutil.copytree(alive, data_dir)
    store.close()
    return found


def write(offset: int, content: bytes) -> Damage:
    def damage(data_dir: Path) -> None:
        with (data_dir / CATALOGUE).open("r+b") as file:
            file.seek(offset)
            file.write(content)

    return damage


def execute(sql: str) -> Damage:
    def damage(data_dir: Path) -> None:
        connection = sqlite3.connect(data_dir / CATALOGUE, isolation_level=None)
        connection.executescript(sql)
        connection.close()

    return damage


def empty(data_dir: Path) -> None:
    os.truncate(data_dir / CATALOGUE, 0)


DAMAGE: dict[str, Damage] = {
    "missing": lambda data_dir: (data_dir / CATALOGUE).unlink(),
    "empty": empty,
    "cut": lambda data_dir: os.truncate(data_dir / CATALOGUE, 5000),
    "junk": lambda data_dir: (data_dir / CATALOGUE).write_bytes(b"junk" * 5000),
    "damaged header": write(20, b"\0" * 60),
    "damaged pages": write(4096, b"\xff" * 8192),
    "missing table": execute("DROP TABLE aliases"),
    "another's tables": execute("DROP TABLE versions; CREATE TABLE versions (x)"),
    "inconsistent": execute("UPDATE names SET current = 77"),
    "newer release": execute("PRAGMA user_version = 99"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_catalogue_that_is_lost_or_damaged_is_set_aside_and_made_anew(data_dir: Path, damage: Damage) -> None:
    before = filled(data_dir)
    damage(data_dir)
    left = (data_dir / CATALOGUE).read_bytes() if (data_dir / CATALOGUE).exists() else None
    store = Store(data_dir)
    assert everything(store) == before
    assert len(store.notes) == 2
    assert "it is made anew from what the files of the adapters say" in store.notes[0]
    assert "5 names and 2 aliases" in store.notes[1]  # the deleted ones are known too
    assert (store.quarantined, list((data_dir / "staging").iterdir())) == ([], [])
    aside = data_dir / "quarantine" / "catalogue" / CATALOGUE
    assert (aside.read_bytes() if left is not None else None) == left
    assert publish(store, "gone", b"again").record.version == 2
    store.check_integrity()
    store.close()
    again = Store(data_dir)
    assert (again.notes, again.names()) == ([], ["Gone", "gated", "gone", "json", "sql"])
    again.close()


AFTER_KILL: dict[str, Damage] = {
    "nothing lost": lambda data_dir: None,
    "log lost": lambda data_dir: (data_dir / WAL).unlink(),
    "emptied beside its log": empty,
    "missing beside its log": lambda data_dir: (data_dir / CATALOGUE).unlink(),
    "log cut": lambda data_dir: os.truncate(data_dir / WAL, 6000),
    "log emptied": lambda data_dir: os.truncate(data_dir / WAL, 0),
}


@pytest.mark.parametrize("had_before", [False, True])
@pytest.mark.parametrize("damage", AFTER_KILL.values(), ids=AFTER_KILL.keys())
def test_what_the_catalogue_lost_with_its_log_is_brought_up_to_date(
    data_dir: Path, damage: Damage, had_before: bool
) -> None:
    before = killed(data_dir, had_before=had_before)
    damage(data_dir)
    store = Store(data_dir)
    assert everything(store) == before
    assert store.quarantined == []
    assert bool(store.notes) == (damage is not AFTER_KILL["nothing lost"])
    store.check_integrity()
    store.close()


def test_a_catalogue_out_of_a_backup_is_brought_up_to_date(data_dir: Path) -> None:
    first = Store(data_dir)
    publish(first, "sql", b"one")
    publish(first, "gone", b"two")
    first.close()
    shutil.copy(data_dir / CATALOGUE, data_dir.with_name("backup"))
    before = filled(data_dir)
    shutil.copy(data_dir.with_name("backup"), data_dir / CATALOGUE)
    store = Store(data_dir)
    assert everything(store) == before
    store.check_integrity()
    store.close()


def test_descriptions_out_of_a_backup_do_not_undo_what_the_catalogue_knows(data_dir: Path) -> None:
    first = Store(data_dir)
    publish(first, "sql", b"one")
    publish(first, "gone", b"two")
    first.close()
    for folder in ("names", "aliases"):
        shutil.copytree(data_dir / folder, data_dir.with_name(folder))
    before = filled(data_dir)
    for folder in ("names", "aliases"):
        shutil.rmtree(data_dir / folder)
        shutil.copytree(data_dir.with_name(folder), data_dir / folder)
    Store(data_dir).close()
    empty(data_dir)  # what was older has been written again
    store = Store(data_dir)
    assert everything(store) == before
    store.close()


NEWS = (
    "ALTER TABLE names DROP COLUMN shared_with; ALTER TABLE names DROP COLUMN gate;"
    "ALTER TABLE versions DROP COLUMN standing; ALTER TABLE versions DROP COLUMN verdict;"
    "ALTER TABLE aliases DROP COLUMN mixing; ALTER TABLE aliases DROP COLUMN canary;"
    "ALTER TABLE blobs DROP COLUMN place; DROP TABLE position; DROP TABLE folders;"
)


def as_before(found: dict[str, Any]) -> dict[str, Any]:
    """As before adapters could be shared, and had gates."""

    def ungated(record: VersionRecord) -> VersionRecord:
        return replace(record, standing=None, verdict=None)

    names = {
        name: (ungated(current), [ungated(version) for version in versions], is_pinned)
        for name, (current, versions, is_pinned) in found["names"].items()
    }
    nobody, no_gate = dict.fromkeys(found["shared_with"], ()), dict.fromkeys(found["gates"])
    return found | {"names": names, "shared_with": nobody, "gates": no_gate}


def make_previous_release(data_dir: Path) -> None:
    """Take from a data directory what releases before this one did not write."""
    execute(
        "ALTER TABLE names DROP COLUMN revision; ALTER TABLE names DROP COLUMN removed;"
        f"{NEWS} ALTER TABLE aliases DROP COLUMN revision; PRAGMA user_version = 4"
    )(data_dir)
    for folder in ("names", "aliases"):
        shutil.rmtree(data_dir / folder)


def test_what_an_earlier_release_stored_is_described_at_the_first_start(data_dir: Path) -> None:
    before = as_before(filled(data_dir))
    make_previous_release(data_dir)
    store = Store(data_dir)
    assert (everything(store), store.notes) == (before, [])
    store.close()
    empty(data_dir)
    store = Store(data_dir)
    assert everything(store) == before
    store.close()


def test_what_an_earlier_release_described_is_shared_with_nobody_and_has_no_gate(data_dir: Path) -> None:
    before = as_before(filled(data_dir))
    execute(f"{NEWS} PRAGMA user_version = 5")(data_dir)
    manifests = Manifests(data_dir / "names", data_dir / "staging")
    for name, manifest in manifests.read()[0].items():
        del manifest.facts["shared_with"], manifest.facts["gate"]
        for version in manifest.facts["versions"]:
            del version["standing"], version["verdict"]
        with manifests.undone_on_error():
            manifests.put(name, manifest)
    store = Store(data_dir)
    assert everything(store) == before
    store.close()
    empty(data_dir)
    store = Store(data_dir)
    assert everything(store) == before
    store.close()


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("damage", ["empty", "missing", "junk", "damaged pages"])
def test_where_nothing_says_what_the_files_are_nothing_is_touched(data_dir: Path, damage: str) -> None:
    filled(data_dir)
    make_previous_release(data_dir)
    DAMAGE[damage](data_dir)
    if damage in ("empty", "missing"):
        (data_dir / WAL).write_bytes(b"what may yet be read")
    before = tree(data_dir)
    with pytest.raises(StoreError, match="bring the catalogue back, or move the folder blobs away"):
        Store(data_dir)
    assert tree(data_dir) == before


BAD_DESCRIPTIONS: dict[str, Damage] = {
    "empty": lambda path: os.truncate(path, 0),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "changed": lambda path: path.write_bytes(path.read_bytes().replace(b'"rank": 4', b'"rank": 8')),
    "another's": lambda path: shutil.copy(path.with_name("json"), path),
    "a folder": replace_by_folder,
    "a link": lambda path: link_to(path, path.with_name("json")),
}


@pytest.mark.parametrize("damage", BAD_DESCRIPTIONS.values(), ids=BAD_DESCRIPTIONS.keys())
def test_a_damaged_description_is_set_aside_and_written_again(data_dir: Path, damage: Damage) -> None:
    before = filled(data_dir)
    damage(data_dir / "names" / "sql")
    store = Store(data_dir)
    assert everything(store) == before
    assert ["'sql' is damaged" in note for note in store.notes] == [True]
    assert os.path.lexists(data_dir / "quarantine" / "names-sql")
    store.close()
    empty(data_dir)
    store = Store(data_dir)
    assert everything(store) == before
    store.close()


def test_of_what_nothing_knows_the_name_the_files_are_kept(data_dir: Path) -> None:
    filled(data_dir)
    store = Store(data_dir)
    lost, removed = store.version("sql", 2).digest, publish(store, "removed", b"removed").record.digest
    store.delete("removed")
    store.close()
    os.truncate(data_dir / "names" / "sql", 0)
    empty(data_dir)
    store = Store(data_dir)
    assert store.names() == ["Gone", "gated", "json"]
    assert any("'sql' is damaged" in note for note in store.notes)
    for digest in (lost, removed):  # of what was deleted, too: there is nothing left to be sure by
        assert (data_dir / "quarantine" / hex_of(digest) / "adapter_model.safetensors").exists()
    store.close()


def test_a_description_of_a_newer_release_is_left_alone(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(data_dir)
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "FORMAT", manifests.FORMAT + 1)
        store = Store(data_dir)
        store.change("sql", is_pinned=False)
        store.close()
    before = tree(data_dir)
    with pytest.raises(StoreError, match="newer release"):
        Store(data_dir)
    assert tree(data_dir) == before


def test_a_description_can_be_read_by_people(data_dir: Path) -> None:
    filled(data_dir)
    facts = json.loads((data_dir / "names" / "sql").read_text().splitlines()[0])["facts"]
    assert (facts["current"], facts["last_version"], facts["is_pinned"]) == (2, 3, 1)
    assert [version["source"] for version in facts["versions"]] == ["hf://org/sql"] * 2


def test_what_was_deleted_is_swept_and_what_is_unknown_is_set_aside(data_dir: Path) -> None:
    store = Store(data_dir)
    deleted = publish(store, "deleted", b"deleted").record
    publish(store, "kept", b"kept")
    store.delete("deleted")
    store.close()
    unknown = data_dir / "blobs" / ("0" * 64)
    unknown.mkdir()
    (unknown / "adapter_model.safetensors").write_bytes(b"unknown")
    (data_dir / "blobs" / "link").symlink_to(data_dir.parent)
    (data_dir / "staging" / "x").mkdir()
    store = Store(data_dir)
    assert [path.name for path in (data_dir / "blobs").iterdir()] == [hex_of(store.current("kept").digest)]
    assert sorted(path.name for path in (data_dir / "quarantine").iterdir()) == ["0" * 64, "link"]
    assert not (data_dir / "quarantine" / hex_of(deleted.digest)).exists()
    assert list((data_dir / "staging").iterdir()) == []
    assert store.notes == ["2 folders of files that no adapter has were set aside in the quarantine"]
    store.close()


def test_what_lies_in_the_quarantine_is_never_replaced(data_dir: Path) -> None:
    for content in (b"first", b"second"):
        Store(data_dir).close()
        (data_dir / "blobs" / ("0" * 64)).mkdir()
        (data_dir / "blobs" / ("0" * 64) / "x").write_bytes(content)
    Store(data_dir).close()
    aside = data_dir / "quarantine"
    assert [(aside / name / "x").read_bytes() for name in ("0" * 64, "0" * 64 + ".2")] == [b"first", b"second"]


def test_files_that_were_left_behind_are_forgotten_once_they_are_gone(data_dir: Path) -> None:
    store = Store(data_dir)
    for content in (b"one", b"two", b"three"):
        digest = publish(store, "sql", content).record.digest
        store.delete("sql")
        store.discard_unreferenced(digest)
    store.close()
    facts = json.loads((data_dir / "names" / "sql").read_text().splitlines()[0])["facts"]
    assert facts["removed"] == [digest]


@pytest.mark.parametrize("name", ["blobs", "staging", "quarantine", "names", "aliases", CATALOGUE, "lock", "reserve"])
@pytest.mark.parametrize("was_there", [False, True])
def test_a_link_in_the_data_directory_is_refused_and_not_followed(
    data_dir: Path, tmp_path: Path, name: str, was_there: bool
) -> None:
    if was_there:
        filled(data_dir)
        remove = shutil.rmtree if (data_dir / name).is_dir() else os.unlink
        remove(data_dir / name)
    else:
        data_dir.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    (data_dir / name).symlink_to(elsewhere)
    with pytest.raises(StoreError, match=f"{name} is a link"):
        Store(data_dir)
    assert (elsewhere / "precious").exists()


def test_a_data_directory_may_be_a_link_itself(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    data_dir.symlink_to(tmp_path / "disk")
    filled(data_dir)
    assert (tmp_path / "disk" / CATALOGUE).exists()


def test_a_file_in_the_place_of_a_folder_is_one_line(data_dir: Path) -> None:
    data_dir.mkdir()
    (data_dir / "staging").touch()
    with pytest.raises(StoreError, match=r"cannot be used \(staging\): File exists; choose another --data-dir"):
        Store(data_dir)


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_a_data_directory_that_cannot_be_written_is_one_line(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    if call == "open":
        Store(data_dir).close()

    def fail(path: Any, *_arguments: Any, **_options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StoreError, match="Read-only file system; choose another --data-dir"):
        Store(data_dir)


def test_a_catalogue_in_use_by_another_program_is_not_set_aside(data_dir: Path) -> None:
    filled(data_dir)
    other = sqlite3.connect(data_dir / CATALOGUE, isolation_level=None)
    other.executescript("PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE;")
    with pytest.raises(StoreError, match="locked"):
        Store(data_dir)
    other.close()
    assert list((data_dir / "quarantine").iterdir()) == []


def test_a_page_that_is_damaged_while_serving_is_one_line(data_dir: Path) -> None:
    filled(data_dir)
    DAMAGE["damaged pages"](data_dir)
    connection = sqlite3.connect(data_dir / CATALOGUE)
    with pytest.raises(StorageFailedError, match="the next start rebuilds it"), raising_storage_errors():
        connection.execute("SELECT * FROM names, versions, blobs").fetchall()
    connection.close()


@pytest.mark.parametrize("change", ["replace", "first", "delete", "pin", "share", "alias", "unalias"])
def test_a_change_that_cannot_be_committed_is_not_described(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    before = filled(data_dir)
    store = Store(data_dir)
    described = tree(data_dir)
    changes: dict[str, Callable[[], object]] = {
        "replace": lambda: publish(store, "sql", b"new"),
        "first": lambda: publish(store, "new", b"new"),
        "delete": lambda: store.delete("sql"),
        "pin": lambda: store.change("json", is_pinned=True),
        "share": lambda: store.change("json", shared_with=["*"]),
        "alias": lambda: store.put_alias(Alias("new", (Target("sql", 1),))),
        "unalias": lambda: store.remove_alias("canary"),
    }
    real = Catalogue.transaction

    @contextmanager
    def full(self: Catalogue) -> Iterator[None]:
        with real(self):
            yield
            raise StorageFullError("full")

    with monkeypatch.context() as patch:
        patch.setattr(Catalogue, "transaction", full)
        with pytest.raises(StorageFullError):
            changes[change]()
    left = tree(data_dir)
    assert {p: c for p, c in left.items() if "/" in p} == {p: c for p, c in described.items() if "/" in p}
    assert everything(store) == before
    store.close()


def test_a_name_that_is_too_long_is_set_aside_under_a_shorter_one(data_dir: Path) -> None:
    before = filled(data_dir)
    (data_dir / "names" / ("x" * 253)).write_bytes(b"?")
    store = Store(data_dir)
    assert everything(store) == before
    assert [path.name[:9] for path in (data_dir / "quarantine").iterdir()] == ["names-xxx"]
    store.close()


def test_a_file_system_without_hard_links_will_do(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Path, _target: Path) -> None:
        raise OSError(errno.EPERM if source.exists() else errno.ENOENT, "planted")

    monkeypatch.setattr(os, "link", no_links)
    before = filled(data_dir)
    empty(data_dir)
    store = Store(data_dir)
    assert everything(store) == before
    store.close()


def test_a_stored_config_that_is_refused_today_stays_where_it_is(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(data_dir)
    record = publish(store, "sql", b"one").record

    def refusing(_raw: bytes) -> None:
        raise InvalidAdapterError(["target_modules: not any more"])

    with monkeypatch.context() as patch:
        patch.setattr(blobs, "parse_spec", refusing)
        with pytest.raises(AdapterFailedError, match="refused by this release: target_modules: not any more"):
            store.verify(record.digest)
    assert list((data_dir / "quarantine").iterdir()) == []
    store.verify(record.digest)
    assert store.current("sql").failure is None
    store.close()


@pytest.mark.parametrize("lost", [False, True])
def test_a_mixture_that_is_called_as_an_adapter_is_set_aside(data_dir: Path, lost: bool) -> None:
    """A release that knows no mixtures gives an adapter the name of one."""
    store = Store(data_dir)
    for name in ("one", "two"):
        publish(store, name, name.encode())
    store.put_alias(Alias("both", (Target("one", 1), Target("two", 1)), Mixing(1, 1.0)))
    publish(store, "both", b"both")
    store.close()
    if lost:
        for path in data_dir.glob(f"{CATALOGUE}*"):
            path.unlink()
    store = Store(data_dir)
    assert store.current("both").version == 1
    assert store.aliases() == []
    [note] = [note for note in store.notes if "'both' is called as an adapter is" in note]
    assert "in the quarantine as 'aliases-both'" in note
    assert (data_dir / "quarantine" / "aliases-both").exists()
    store.close()
    store = Store(data_dir)
    assert (store.aliases(), store.notes) == ([], [])
    store.close()


@pytest.mark.parametrize("lost", [False, True])
def test_an_alias_that_is_called_as_an_adapter_was_stays(data_dir: Path, lost: bool) -> None:
    """Which may be made once that is deleted; and the version numbers of the adapter go on when the alias is gone."""
    store = Store(data_dir)
    publish(store, "sql", b"one")
    publish(store, "prod", b"two")
    store.delete("prod")
    alias = Alias("prod", (Target("sql", 1),))
    store.put_alias(alias)
    store.close()
    if lost:
        for path in data_dir.glob(f"{CATALOGUE}*"):
            path.unlink()
    store = Store(data_dir)
    assert (store.aliases(), store.names()) == ([alias], ["sql"])
    assert lost or not store.notes
    store.remove_alias("prod")
    assert publish(store, "prod", b"two").record.version == 2
    store.close()
