"""A folder and a bucket, each of which several servers share."""

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from adapter_files import write_adapter
from swaplora_adapters.store.shared.address import open_objects

AWS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "hunter2",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(moto_url: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The address of one that is empty."""
    for name, value in (AWS | {"AWS_ENDPOINT_URL_S3": moto_url}).items():
        monkeypatch.setenv(name, value)
    name = f"b{abs(hash(request.node.nodeid)):x}"
    client = boto3.session.Session().client("s3")
    client.create_bucket(Bucket=name)
    client.close()
    return f"s3://{name}/team"


@pytest.fixture(autouse=True)
def shared_folder(tmp_path: Path) -> Path:
    """That of a store which is to be made."""
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


@pytest.fixture(params=["folder", "bucket"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty store, of either kind."""
    return str(request.getfixturevalue("bucket")) if request.param == "bucket" else str(tmp_path / "shared")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of which no two are alike."""
    folder = tmp_path_factory.mktemp("files")
    return [write_adapter(folder / f"a{seed}", seed=seed) for seed in range(6)]


@pytest.fixture
def folder_objects(tmp_path: Path) -> object:
    return open_objects(str(tmp_path / "shared"))
