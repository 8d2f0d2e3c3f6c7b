"""How a shared store comes to be, or is brought back, or not, and what the places it lies in may do to it."""

import itertools
import json
import os
import shutil
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse

from replicas import Disturbed, facts, put, registry, replicas, see, store_of, unreachable
from swaplora_adapters.errors import StoreChangedError, StoreUnreachableError
from swaplora_adapters.files.disk import StoreError
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.store.shared import trying
from swaplora_adapters.store.shared.address import open_objects
from swaplora_adapters.store.shared.bucket import BucketObjects
from swaplora_adapters.store.shared.history import compaction, segments
from swaplora_adapters.store.shared.history.log import Log
from swaplora_adapters.store.shared.history.snapshots import EMPTY, Snapshots
from swaplora_adapters.store.shared.objects import Listed
from test_catalogue import local, weights_of


def in_bucket(address: str) -> BucketObjects:
    objects = open_objects(address)
    assert isinstance(objects, BucketObjects)
    return objects


def read_only(address: str) -> Disturbed:
    """A store in which nothing can be made."""
    objects = Disturbed(open_objects(address))

    def refuse(call: str, _key: str) -> None:
        if call in {"put", "create"}:
            raise unreachable()

    objects.before = refuse
    return objects


def test_a_large_file_is_taken_by_a_bucket_that_refuses_every_third_call(bucket: str, tmp_path: Path) -> None:
    objects, calls = in_bucket(bucket), itertools.count(1)
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(20 << 20))

    def refuse(request: Any, **_fields: Any) -> AWSResponse | None:
        if next(calls) % 3:
            return None
        raw = SimpleNamespace(stream=lambda *_, **__: iter([b""]))
        return AWSResponse(request.url, 503, {}, raw)

    for call in ("CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"):
        objects._files.meta.events.register(f"before-send.s3.{call}", refuse)  # noqa: SLF001
    objects.put("weights", path)
    assert next(calls) > 6
    assert objects.fetch("weights", tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == path.read_bytes()


def test_a_bucket_may_list_in_any_order(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = in_bucket(bucket)
    for key in ("a/1", "a/2", "a/3"):
        objects.create(key, b"1")
    paginator = objects._small.get_paginator  # noqa: SLF001

    def backwards(pages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"Contents": page["Contents"][::-1]} for page in reversed(pages)]

    monkeypatch.setattr(
        objects._small,  # noqa: SLF001
        "get_paginator",
        lambda name: SimpleNamespace(paginate=lambda **asked: backwards([*paginator(name).paginate(**asked)])),
    )
    assert [each.key for each in objects.under("a/")] == ["a/1", "a/2", "a/3"]


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = open_objects(str(tmp_path / "shared"))
    objects.create("a/b/1", b"1")
    objects.create("a-b", b"1")
    assert [each.key for each in objects.under("a")] == ["a-b", "a/b/1"]
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StoreUnreachableError):
        objects.under("a/")


@pytest.mark.parametrize("is_filled", [True, False])
def test_a_data_directory_whose_store_was_not_made_can_be_used_alone(
    files: list[Path], tmp_path: Path, is_filled: bool
) -> None:
    """And with a store later: there is none that it is taken for a copy of."""
    if is_filled:
        alone = local(tmp_path / "data0")
        put(alone, "sql", files[0])
        alone.close()
    objects = read_only(str(tmp_path / "shared"))
    with pytest.raises(StoreUnreachableError):
        registry(tmp_path / "data0", objects)
    objects.come_back()
    alone = local(tmp_path / "data0")
    assert any("not made" in note for note in alone._store.notes)  # noqa: SLF001
    put(alone, "tales", files[1])
    alone.close()
    with replicas(tmp_path, [objects]) as (one,), replicas(tmp_path / "other", [objects]) as (other,):
        known = [[each.current.name for each in of.names.index.all()] for of in (one, other)]
        assert known[0] == known[1]
        assert set(known[0]) == ({"sql", "tales"} if is_filled else {"tales"})
    with pytest.raises(StoreError, match="--shared-store"):
        local(tmp_path / "data0")


def test_what_nobody_knows_in_a_directory_of_which_no_store_was_made_yet_is_set_aside(
    files: list[Path], tmp_path: Path
) -> None:
    """It is no copy: nobody else has these files."""
    alone = local(tmp_path / "data0")
    digests = [put(alone, name, files[number]).record.digest for number, name in enumerate(("sql", "tales"))]
    alone.close()
    objects = read_only(str(tmp_path / "shared"))
    for breaks in (False, True):
        if breaks:  # a bad disk, after the first start
            (tmp_path / "data0/catalogue.sqlite3").unlink()
            (tmp_path / "data0/names/sql").write_bytes(b"damaged")
        with pytest.raises(StoreUnreachableError):
            registry(tmp_path / "data0", objects)
    objects.come_back()
    with replicas(tmp_path, [objects]) as (one,):
        assert [*facts(one)] == ["tales"]
    assert (tmp_path / "data0/quarantine" / digests[0].removeprefix("sha256:")).exists()


def test_a_directory_that_was_used_alone_since_is_no_copy_of_the_store_that_was_made_all_the_same(
    files: list[Path], tmp_path: Path
) -> None:
    """The founding came to its end but for this server's own mark."""
    objects = Disturbed(open_objects(str(tmp_path / "shared")))

    def refuse(call: str, key: str) -> None:
        if call == "create" and key == "store.json":
            raise unreachable()

    objects.after = refuse
    with pytest.raises(StoreUnreachableError):
        registry(tmp_path / "data0", objects)
    objects.come_back()
    alone = local(tmp_path / "data0")
    put(alone, "sql", files[0])
    alone.close()
    with pytest.raises(StoreError, match="does not know of"):
        registry(tmp_path / "data0", objects)


def test_a_store_that_says_damaged_things_of_itself_starts_no_server(tmp_path: Path) -> None:
    objects = open_objects(str(tmp_path / "shared"))
    registry(tmp_path / "data0", objects).close()
    for content in (b"{", b"[]", b"{}", b""):
        (tmp_path / "shared/store.json").write_bytes(content)
        with pytest.raises(StoreError, match=r"store\.json"):
            registry(tmp_path / "data0", objects)


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots after each fourth change, and the log is cut, where a test says so."""
    monkeypatch.setattr(segments, "SEGMENT", 4)
    monkeypatch.setattr("swaplora_adapters.registry.changes.TIDY_SECONDS", 3600)


def cut(of: Registry) -> None:
    """An hour after the newest snapshot."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "GRACE_SECONDS", -1.0)
        store_of(of).tidy()
        store_of(of).tidy()


def copied(shared: Path, to: Path, *kinds: str) -> None:
    """What a backup has, of these kinds alone."""
    store = shared / json.loads((shared / "store.json").read_bytes())["id"]
    for kind in kinds:
        path = shared / kind if kind == "store.json" else store / kind
        target = to / path.relative_to(shared)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        elif path.exists():
            shutil.copytree(path, target)


@pytest.mark.usefixtures("by_hand")
def test_a_backup_that_is_made_beside_changes_and_a_cut_has_all_that_was_acknowledged_before_it(
    files: list[Path], tmp_path: Path
) -> None:
    """In the documented order, with an upload and a cut after each step."""
    shared, backup = tmp_path / "shared", tmp_path / "backup"
    with replicas(tmp_path, [open_objects(str(shared))]) as (one,):
        for number in range(4):
            put(one, f"n{number}", files[0])
        store_of(one).tidy()
        known = facts(one)
        for number, kinds in enumerate((["store.json", "base.json"], ["snapshots"], ["log"], ["trimmed"], ["blobs"])):
            copied(shared, backup, *kinds)
            put(one, f"later{number}", files[1 + number])
            if number:
                cut(one)
    with replicas(tmp_path / "back", [open_objects(str(backup))]) as (back,):
        assert facts(back).items() >= known.items()
        for name in facts(back):
            assert weights_of(back, name)
        put(back, "new", files[5])
    with replicas(tmp_path / "back", [open_objects(str(backup))] * 2) as (back, new):
        see(back)
        assert facts(new) == facts(back)
        assert "new" in facts(new)


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("is_changed", [False, True])
def test_a_backup_that_lacks_the_note_of_a_cut_is_what_its_snapshot_says(
    files: list[Path], tmp_path: Path, is_changed: bool
) -> None:
    """All but the log was copied before the cut, the log after it."""
    shared, backup = tmp_path / "shared", tmp_path / "backup"
    with replicas(tmp_path, [open_objects(str(shared))]) as (one,):
        for number in range(4):
            put(one, f"n{number}", files[number])
        store_of(one).tidy()
        copied(shared, backup, "store.json", "base.json", "snapshots", "trimmed")
        for number in range(4 + is_changed):
            put(one, f"n{number + is_changed}", files[(number + 2) % 6])
        cut(one)
        copied(shared, backup, "log", "blobs")
        assert min(each.name for each in backup.glob("*/log/*")).endswith("5")
        known = facts(one)
    for folder in ("data0", "data0", "data1", "new"):  # also one that was there before, and after its restart
        of = registry(tmp_path / folder, open_objects(str(backup)))
        see(of)
        assert facts(of) == known
        put(of, f"of_{folder}", files[0])
        known = facts(of)
        of.close()


@pytest.mark.usefixtures("by_hand")
def test_a_listing_that_passes_over_some_loses_no_note_and_starts_no_alarm(files: list[Path], tmp_path: Path) -> None:
    """As folders that are read beside changes may."""
    objects = [Disturbed(open_objects(str(tmp_path / "shared"))) for _ in range(2)]
    of = objects[0].under

    def under(prefix: str) -> list[Listed]:
        return [each for each in of(prefix) if not ("/log/" in each.key and each.key.endswith(("0001", "0002")))]

    objects[0].under = under  # type: ignore[method-assign]
    with replicas(tmp_path / "away", objects[1:]) as (away,):
        put(away, "sql", files[0])
    with replicas(tmp_path, objects[:1]) as (one,):
        for number in range(9):
            put(one, "tales", files[number % 5])
            if number > 4:
                cut(one)
        objects[0].under = of  # type: ignore[method-assign]
        store_of(one)._compaction._trimmed_to = 0  # noqa: SLF001
        cut(one)
        assert [int(each.key[-4:]) for each in of("") if "/log/" in each.key] == [*range(5, 11)]
        with replicas(tmp_path / "away", objects[1:]) as (away,):
            see(away)
            assert facts(away) == facts(one)


def snapshots(shared: Path) -> list[Path]:
    return sorted(shared.glob("*/snapshots/*"))


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("is_away", [False, True])
@pytest.mark.parametrize("num_left", [1, 2])
def test_a_server_begins_at_the_snapshot_before_a_damaged_one_and_says_so(
    files: list[Path], tmp_path: Path, num_left: int, is_away: bool
) -> None:
    """However far the log was cut; also one that was away since before it was."""
    objects, other = open_objects(str(tmp_path / "shared")), "away" if is_away else "new"
    with replicas(tmp_path, [objects]) as (one,):
        if is_away:
            with replicas(tmp_path / "away", [objects]) as (away,):
                put(away, "sql", files[0])
        for number in range(4 * num_left + 1):
            put(one, f"n{number}", files[0])
            cut(one)
        assert len(snapshots(tmp_path / "shared")) == num_left
        newest = snapshots(tmp_path / "shared")[-1]
        damage(newest)
        with replicas(tmp_path / other, [objects]) as (begun,):
            assert facts(begun) == facts(one)
            assert [newest.name in note for note in store_of(begun).notes] == [True]
        assert put(one, "late", files[1]).record.version == 1
        if num_left == 2:
            damage(snapshots(tmp_path / "shared")[0])
            with pytest.raises(StoreUnreachableError, match=f"{newest.name} in the shared store is damaged.*backup"):
                registry(tmp_path / "newer", objects)


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("is_old", [False, True])
def test_nothing_is_removed_for_a_snapshot_that_cannot_be_read(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_old: bool
) -> None:
    """It is made anew of the log, which is told; and what nothing refers to is swept all the same."""
    objects, told = open_objects(str(tmp_path / "shared")), list[bool]()
    with replicas(tmp_path, [objects]) as (one,):
        for number in range(5):
            put(one, "sql", files[number])
        store_of(one).tidy()
        [snapshot] = snapshots(tmp_path / "shared")
        if is_old:  # as an earlier release calls it
            snapshot = snapshot.rename(snapshot.with_name(snapshot.name.partition("-")[0]))
        content = snapshot.read_bytes()
        damage(snapshot)
        monkeypatch.setattr(store_of(one), "_sweep_at", 0.0)
        monkeypatch.setattr(store_of(one), "sweep", lambda: told.append(True))
        with pytest.raises(StoreUnreachableError, match=f"{snapshot.name} in the shared store is damaged"):
            cut(one)
        assert told == [True]
        assert len([each for each in objects.under("") if "/log/" in each.key]) == 5
        [made] = snapshots(tmp_path / "shared")
        assert made.read_bytes() == content
        with replicas(tmp_path / "new", [objects]) as (new,):
            assert facts(new) == facts(one)


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"", "Expecting value"),
        (b"\xff", "codec"),
        (b"[]", "no JSON object"),
        (b"{}", "it lacks 'name'"),
        (b"[" * 100_000, "recursion"),
        (b'{"name": 1}', "another type"),
        (b'{"format": "1"}', "another type"),
    ],
)
def test_a_damaged_base_of_all_is_refused_by_its_name(tmp_path: Path, content: bytes, wrong: str) -> None:
    objects = open_objects(str(tmp_path / "shared"))
    registry(tmp_path / "data0", objects).close()
    [said_at] = (tmp_path / "shared").glob("*/base.json")
    whole = said_at.read_bytes()
    said_at.write_bytes(content)
    with pytest.raises(StoreError, match=rf"base\.json in the shared store.*damaged \(.*{wrong}.*stop all servers"):
        registry(tmp_path / "data0", objects)
    said_at.write_bytes(whole)
    registry(tmp_path / "data0", objects).close()


def rewritten(path: Path, found: int) -> None:
    """As a release with this format writes it."""
    lines = [json.loads(line) for line in path.read_bytes().splitlines()[:-1] or [path.read_bytes()]]
    lines[0]["format"] = found
    content = b"\n".join(json.dumps(line).encode() for line in lines)
    path.write_bytes(content if path.suffix else b"%b\n%b\n" % (content, sha256(content).hexdigest().encode()))


@pytest.mark.parametrize("what", ["store.json", "base.json", "log/*1", "snapshots/*", "trimmed/*"])
@pytest.mark.usefixtures("by_hand")
def test_a_server_reads_its_own_format_and_the_one_before_it(files: list[Path], tmp_path: Path, what: str) -> None:
    """And has the store say that it was there; a later and an earlier one are refused, whatever object is of it."""
    objects, shared = open_objects(str(tmp_path / "shared")), tmp_path / "shared"
    with replicas(tmp_path, [objects]) as (one,):
        for number in range(9):
            put(one, f"n{number}", files[number % 5])
            if what != "log/*1":
                cut(one)
        known = facts(one)
    path = max(shared.glob(what if what == "store.json" else f"*/{what}"))
    for found, told in ((trying.FORMAT + 1, "newer release: start that one"), (trying.FORMAT - 2, "too old a release")):
        rewritten(path, found)
        with pytest.raises(StoreError, match=told) as refused:
            registry(tmp_path / "new", objects)
        assert path.name in str(refused.value) or "trimmed" in what or "log" in what
    rewritten(path, trying.FORMAT - 1)
    with replicas(tmp_path / "newer", [objects]) as (new,):
        assert facts(new) == known
        put(new, "late", files[0])
    assert json.loads((shared / "store.json").read_bytes())["format"] == trying.FORMAT


@pytest.mark.usefixtures("by_hand")
def test_a_server_that_finds_a_change_of_a_newer_release_gives_no_old_answer(files: list[Path], tmp_path: Path) -> None:
    with replicas(tmp_path, [open_objects(str(tmp_path / "shared"))] * 2) as (one, other):
        with other.names.changes:
            put(one, "sql", files[0])
            [path] = (tmp_path / "shared").glob("*/log/*")
            rewritten(path, trying.FORMAT + 1)
        with pytest.raises(StoreChangedError, match="newer release"):
            see(other)
        with pytest.raises(StoreChangedError, match="newer release"):
            put(other, "tales", files[1])


def test_a_snapshot_is_not_kept_out_by_one_of_another_history(tmp_path: Path) -> None:
    objects = open_objects(str(tmp_path / "shared"))
    made = Snapshots(objects, "s", Log(objects, "s"))
    for change in ("b", "a"):
        made.put(EMPTY._replace(revision=4, id=change))
        assert made.last() == (4, change)
