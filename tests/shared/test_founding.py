"""How a shared store comes to be, or is brought back, or not, and what the places it lies in may do to it."""

import itertools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse

from replicas import Disturbed, facts, put, registry, replicas, see, store_of, unreachable
from swaplora_adapters.errors import StoreUnreachableError
from swaplora_adapters.files.disk import StoreError
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.store.shared.address import open_objects
from swaplora_adapters.store.shared.bucket import BucketObjects
from swaplora_adapters.store.shared.history import compaction, segments
from swaplora_adapters.store.shared.objects import Listed
from test_catalogue import local, weights_of


def in_bucket(address: str) -> BucketObjects:
    objects = open_objects(address)
    assert isinstance(objects, BucketObjects)
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
    objects = Disturbed(open_objects(str(tmp_path / "shared")))

    def refuse(call: str, _key: str) -> None:
        if call in {"put", "create"}:
            raise unreachable()

    objects.before = refuse
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
        for number in range(4 + is_changed):
            put(one, f"n{number}", files[number])
        store_of(one).tidy()
        copied(shared, backup, "store.json", "base.json", "snapshots", "trimmed", "blobs")
        cut(one)
        copied(shared, backup, "log")
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
        for number in range(4):
            put(one, "tales", files[number])
        cut(one)
        objects[0].under = of  # type: ignore[method-assign]
        store_of(one)._compaction._trimmed_to = 0  # noqa: SLF001
        cut(one)
        assert not [each for each in of("") if "/log/" in each.key and not each.key.endswith("0005")]
        with replicas(tmp_path / "away", objects[1:]) as (away,):
            see(away)
            assert facts(away) == facts(one)


@pytest.mark.usefixtures("by_hand")
def test_nothing_is_removed_for_a_snapshot_that_cannot_be_read(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what nothing refers to is swept all the same."""
    objects, told = open_objects(str(tmp_path / "shared")), list[bool]()
    with replicas(tmp_path, [objects]) as (one,):
        for number in range(5):
            put(one, "sql", files[number])
        store_of(one).tidy()
        [snapshot] = tmp_path.glob("shared/*/snapshots/*")
        snapshot.write_bytes(snapshot.read_bytes()[:-5])
        monkeypatch.setattr(store_of(one), "_sweep_at", 0.0)
        monkeypatch.setattr(store_of(one), "sweep", lambda: told.append(True))
        with pytest.raises(StoreUnreachableError, match="damaged"):
            cut(one)
        assert told == [True]
        assert len([each for each in objects.under("") if "/log/" in each.key]) == 5
