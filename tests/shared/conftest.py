"""A folder and a bucket, each of which several servers share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapter_files import write_adapter
from buckets import make_bucket, serving_buckets
from replicas import Disturbed
from swaplora_adapters.store.shared.address import open_objects


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    with serving_buckets() as url:
        yield url


@pytest.fixture
def bucket(moto_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    return make_bucket(moto_url, monkeypatch)


@pytest.fixture(autouse=True)
def shared_folder(tmp_path: Path) -> Path:
    """That of a store which is to be made."""
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


@pytest.fixture(params=["folder", "bucket"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty store, of either kind."""
    return str(request.getfixturevalue("bucket")) if request.param == "bucket" else str(tmp_path / "shared")


@pytest.fixture
def objects(address: str) -> list[Disturbed]:
    """Two servers' of one empty store, of either kind."""
    return [Disturbed(open_objects(address)) for _ in range(2)]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of which no two are alike."""
    folder = tmp_path_factory.mktemp("files")
    return [write_adapter(folder / f"a{seed}", seed=seed) for seed in range(6)]
