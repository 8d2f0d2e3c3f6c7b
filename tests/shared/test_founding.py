"""How a shared store comes to be, or does not, and what the places it lies in may do to it."""

import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse

from replicas import Disturbed, put, registry, replicas, unreachable
from swaplora_adapters.errors import StoreUnreachableError
from swaplora_adapters.files.disk import StoreError
from swaplora_adapters.store.shared.address import open_objects
from swaplora_adapters.store.shared.bucket import BucketObjects
from test_catalogue import local


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
