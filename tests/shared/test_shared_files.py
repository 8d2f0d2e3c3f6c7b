"""Adapters' files in the shared store and copies of them: mended, bounded, and let go of."""

from pathlib import Path

import pytest

from replicas import Disturbed, put, replicas, see
from swaplora_adapters.errors import AdapterFailedError
from swaplora_adapters.files.naming import WEIGHTS_FILE
from swaplora_adapters.store.shared.address import open_objects
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
