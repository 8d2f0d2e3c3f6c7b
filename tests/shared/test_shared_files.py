"""Adapters' files in the shared store and copies of them: mended, bounded, and let go of."""

from collections.abc import Callable
from pathlib import Path

import pytest

from replicas import Disturbed, put, replicas, see, store_of
from swaplora_adapters.errors import (
    AdapterError,
    AdapterFailedError,
    InvalidAdapterNameError,
    PreconditionFailedError,
    QuotaExceededError,
)
from swaplora_adapters.files.naming import WEIGHTS_FILE
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.registry.tenant import Room, TenantRegistry
from swaplora_adapters.store.conditions import Conditions, NameState
from swaplora_adapters.store.records import Target
from swaplora_adapters.store.shared import files as shared_files
from swaplora_adapters.store.shared.address import open_objects
from swaplora_adapters.store.shared.objects import Listed
from test_catalogue import weights_of


@pytest.fixture
def objects(tmp_path: Path) -> list[Disturbed]:
    return [Disturbed(open_objects(str(tmp_path / "shared"))) for _ in range(2)]


@pytest.mark.parametrize("is_lost", [False, True])
@pytest.mark.parametrize("is_asked_who_has_a_copy", [False, True])
def test_what_the_store_has_lost_or_damaged_is_mended_by_uploading_it_again(
    objects: list[Disturbed], files: list[Path], tmp_path: Path, is_lost: bool, is_asked_who_has_a_copy: bool
) -> None:
    """Whichever server it is sent to; and copies that are damaged as they come are kept nowhere."""
    with replicas(tmp_path, objects) as (one, other):
        digest = put(one, "sql", files[0]).record.digest
        [there] = (tmp_path / "shared").glob(f"*/blobs/*/*/{WEIGHTS_FILE}")
        there.unlink() if is_lost else there.write_bytes(there.read_bytes()[:-1] + b"\0")
        see(other)
        with pytest.raises(AdapterFailedError, match="upload it again"):
            weights_of(other, "sql")
        for _ in range(3):
            with pytest.raises(AdapterFailedError):
                other.names.link_files("sql", tmp_path / "linked")
        assert not list((tmp_path / "data1/quarantine").iterdir())
        asked = one if is_asked_who_has_a_copy else other
        assert put(asked, "sql", files[0]).record.version == 1
        see(other)
        assert weights_of(other, "sql") == digest
        with replicas(tmp_path / "late", objects[:1]) as (late,):
            assert weights_of(late, "sql") == digest
        revision = asked.revision
        put(asked, "sql", files[0])  # once is enough
        assert asked.revision == revision


def take(of: Registry, file: Path) -> None:
    put(of, "tales", file)


def point(of: Registry, _file: Path) -> None:
    of.put_alias("tales", [Target("sql", 1)])


@pytest.mark.parametrize("is_meanwhile", [False, True])
@pytest.mark.parametrize(
    ("elsewhere", "room", "conditions", "refusal"),
    [
        (take, Room(), Conditions(if_none_match=True), PreconditionFailedError),
        (take, Room(), Conditions(if_unchanged_since=NameState(was_used=False, version=None)), PreconditionFailedError),
        (take, Room(2, 1), Conditions(), QuotaExceededError),
        (point, Room(), Conditions(), InvalidAdapterNameError),
    ],
)
def test_of_an_upload_that_is_refused_nothing_stays_in_the_store(
    objects: list[Disturbed],
    files: list[Path],
    tmp_path: Path,
    elsewhere: Callable[[Registry, Path], None],
    room: Room,
    conditions: Conditions,
    refusal: type[AdapterError],
    is_meanwhile: bool,
) -> None:
    """Also where only what another server changes while the files are sent is what refuses it."""
    with replicas(tmp_path, objects) as (one, other):
        put(one, "sql", files[0])
        tenant = TenantRegistry(one, "", room=Room(adapters=9) if is_meanwhile else room)
        sent: list[str] = []

        def meanwhile(call: str, key: str) -> None:
            if call == "put" and WEIGHTS_FILE in key:
                sent.append(key)
                elsewhere(other, files[1])
                tenant._room = room  # noqa: SLF001

        if is_meanwhile:
            objects[0].before = meanwhile
        else:
            elsewhere(other, files[1])
            objects[0].before = lambda call, key: sent.extend([key] if call == "put" else [])
        before = len(list((tmp_path / "shared").glob("*/blobs/*/*/*"))) + 2 * (elsewhere is take) * is_meanwhile
        with pytest.raises(refusal):
            put(tenant, "tales", files[2], conditions=conditions)
        assert len(sent) == is_meanwhile
        assert len(list((tmp_path / "shared").glob("*/blobs/*/*/*"))) == before


def test_what_nothing_refers_to_is_swept_by_a_server_that_is_restarted_meanwhile(
    objects: list[Disturbed], files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not before it was found so for long, nor while it is young itself, whatever the clock says."""

    def swept(after: float) -> int:
        monkeypatch.setattr(shared_files, "SWEPT_AFTER", after)
        with replicas(tmp_path, objects[:1]) as (one,):
            return store_of(one).sweep()

    with replicas(tmp_path, objects[:1]) as (one,):
        put(one, "sql", files[0])
        one.delete("sql").freed.result(60)
    assert swept(-1.0) == 0
    with monkeypatch.context() as patch:
        patch.setattr(objects[0], "under", lambda each: [Listed(key, -5.0) for key, _ in objects[1].under(each)])
        assert swept(-1.0) == 0
    assert swept(3600.0) == 0
    assert swept(-1.0) == 2
    assert swept(-1.0) == 0
