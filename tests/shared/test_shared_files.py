"""Adapters' files in the shared store and copies of them: mended, bounded, and let go of."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from replicas import Disturbed, put, replicas, see, store_of
from swaplora_adapters.errors import (
    AdapterError,
    AdapterFailedError,
    InvalidAdapterNameError,
    PreconditionFailedError,
    QuotaExceededError,
    StorageFullError,
)
from swaplora_adapters.files.naming import WEIGHTS_FILE
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.registry.tenant import Room, TenantRegistry
from swaplora_adapters.store.blobs import Blobs
from swaplora_adapters.store.conditions import Conditions, NameState
from swaplora_adapters.store.records import Target
from swaplora_adapters.store.shared import files as shared_files
from swaplora_adapters.store.shared.address import open_objects
from swaplora_adapters.store.shared.history.moment import Moment
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


class Disk:
    """One server's, with room for so many adapters; what it lacks it finds out as it writes, or before."""

    def __init__(self, folder: Path, room: int, objects: Disturbed) -> None:
        self.blobs, self.room = folder / "blobs", room
        objects.before = self._called

    @property
    def digests(self) -> set[str]:
        return {f"sha256:{path.name}" for path in self.blobs.iterdir()}

    def _called(self, call: str, _key: str) -> None:
        if call == "fetch" and len(self.digests) >= self.room:
            raise StorageFullError("no room is left")


def evict(of: Registry) -> None:
    residency = of._residency  # noqa: SLF001
    for digest in residency.digests()[0]:
        residency.drop(digest)


@pytest.fixture
def full(
    objects: list[Disturbed], files: list[Path], tmp_path: Path
) -> Iterator[tuple[list[Registry], list[str], Disk]]:
    """Two servers, the digests of six adapters that the first was sent, and the second one's disk, with room for 2."""
    with replicas(tmp_path, objects) as (one, other):
        digests = [put(one, f"a{number}", files[number]).record.digest for number in range(6)]
        see(other)
        yield [one, other], digests, Disk(tmp_path / "data1", 2, objects[1])


def test_copies_that_nobody_uses_make_room_for_others(full: tuple[list[Registry], list[str], Disk]) -> None:
    """Those that were used least recently; a server with less room than the store serves all of it."""
    (_, other), digests, disk = full
    for number in (0, 1, 2, 1, 3):
        assert weights_of(other, f"a{number}") == digests[number]
        evict(other)
    assert disk.digests == {digests[1], digests[3]}
    for number in range(6):
        assert weights_of(other, f"a{number}") == digests[number]
        evict(other)
    other.check_integrity()


def test_what_is_used_or_cannot_be_had_again_is_kept_though_another_finds_no_room(
    full: tuple[list[Registry], list[str], Disk], tmp_path: Path
) -> None:
    """Leased, pinned, being read; and what the shared store has lost, or has damaged."""
    (one, other), digests, disk = full
    for number in (0, 1):
        weights_of(other, f"a{number}")
    evict(other)

    def refused() -> None:
        with pytest.raises(StorageFullError, match=r"no room.*in use, or the last ones"):
            other.names.copies.bring(digests[2])
        assert disk.digests == {digests[0], digests[1]}

    lease = other.lease("a0")
    with other.names.copies.held(digests[1]):
        refused()
    [gone] = (tmp_path / "shared").glob(f"*/blobs/{digests[1].removeprefix('sha256:')}/*/{WEIGHTS_FILE}")
    content = gone.read_bytes()
    gone.unlink()
    refused()
    gone.write_bytes(content)
    (gone.parent / "damaged").write_bytes(b"1")
    refused()
    (gone.parent / "damaged").unlink()
    one.change("a1", is_pinned=True)
    see(other)
    refused()
    lease.release()
    assert weights_of(other, "a2") == digests[2]
    assert disk.digests == {digests[1], digests[2]}


def test_a_disk_is_not_filled_in_vain(
    full: tuple[list[Registry], list[str], Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, other), digests, disk = full
    monkeypatch.setattr(Blobs, "free_bytes", lambda _: 0)
    with pytest.raises(StorageFullError, match=r"no room for the [1-9]\d+ bytes"):
        other.names.copies.bring(digests[0])
    assert not disk.digests


@pytest.mark.parametrize("counts", ["awake", "wall"])
def test_what_was_sent_half_a_day_before_its_version_is_made_is_sent_again(
    objects: list[Disturbed], files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: str
) -> None:
    """By either clock: others may have swept it while this machine slept, and one of its clocks did not go on."""
    now, slept, sent = Moment.now, [0.0], list[str]()

    def later(_cls: type[Moment]) -> Moment:
        found = now()
        return found._replace(**{counts: getattr(found, counts) + slept[0]})

    def sleep(call: str, key: str) -> None:
        if call == "put" and WEIGHTS_FILE in key:
            sent.append(key)
            slept[0] = shared_files.SWEPT_AFTER / 2 + 1

    monkeypatch.setattr(Moment, "now", classmethod(later))
    objects[0].after = sleep
    with replicas(tmp_path, objects) as (one, other):
        digest = put(one, "sql", files[0]).record.digest
        first, second = sent
        objects[1].remove(first)  # as another server's sweep does
        see(other)
        assert weights_of(other, "sql") == digest
        assert first != second
