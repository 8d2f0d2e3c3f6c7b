"""Adapters from an object store: read as a pair, bounded, and every failure says what to set."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from adapter_files import write_adapter
from buckets import AWS, serving_buckets
from fake_hub import Answer, FakeHub, run_fake_hub
from swaplora_adapters.errors import (
    AdapterTooLargeError,
    SourceFailedError,
    SourceNotAllowedError,
    SourceNotFoundError,
    StoppingError,
)
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.sources import transfer
from swaplora_adapters.sources.source import Sources
from swaplora_adapters.store.staging import Part, Staging, Writer

URI = "s3://bucket/team/one"
WEIGHTS = f"/bucket/team/one/{WEIGHTS_FILE}"
CONFIG = f"/bucket/team/one/{CONFIG_FILE}"
READING = f"^{URI}: reading {WEIGHTS_FILE}: "


@pytest.fixture(scope="module")
def moto_url() -> Iterator[str]:
    with serving_buckets() as url:
        yield url


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Credentials, and nothing of this machine's; tries follow one another at once."""
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(transfer, "BACKOFF_SECONDS", (0.0, 0.0))
    return monkeypatch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


@pytest.fixture
def store(moto_url: str, environment: pytest.MonkeyPatch, folder: Path) -> Iterator[Any]:
    """A client of a store that holds `folder` at `URI`."""
    environment.setenv("AWS_ENDPOINT_URL_S3", moto_url)
    client = boto3.session.Session().client("s3")
    client.create_bucket(Bucket="bucket")
    put(client, folder)
    yield client
    for version in client.list_object_versions(Bucket="bucket").get("Versions", []):
        client.delete_object(Bucket="bucket", Key=version["Key"], VersionId=version["VersionId"])
    client.delete_bucket(Bucket="bucket")
    client.close()


@pytest.fixture
def broken_store(environment: pytest.MonkeyPatch, folder: Path) -> Iterator[FakeHub]:
    """Something that answers by path as a store would, and can be told to misbehave."""
    with run_fake_hub() as server:
        environment.setenv("AWS_ENDPOINT_URL_S3", server.url)
        server.put(CONFIG, Answer(body=(folder / CONFIG_FILE).read_bytes(), headers={"ETag": '"c"'}))
        server.put(WEIGHTS, Answer(body=(folder / WEIGHTS_FILE).read_bytes(), headers={"ETag": '"w"'}))
        yield server


@pytest.fixture
def staging(tmp_path: Path) -> Iterator[Staging]:
    with Staging(tmp_path) as staging:
        yield staging


@pytest.fixture
def sources() -> Sources:
    return Sources(allowed=("s3://bucket",), folder=None, max_weights_bytes=1 << 20)


def put(client: Any, folder: Path, key: str = "team/one") -> Any:
    """Upload an adapter; returns what the store says of the weights."""
    client.put_object(Bucket="bucket", Key=f"{key}/{CONFIG_FILE}", Body=(folder / CONFIG_FILE).read_bytes())
    return client.put_object(Bucket="bucket", Key=f"{key}/{WEIGHTS_FILE}", Body=(folder / WEIGHTS_FILE).read_bytes())


def assert_staged(staging: Staging, folder: Path) -> None:
    assert staging.config_path.read_bytes() == (folder / CONFIG_FILE).read_bytes()
    assert staging.weights_path.read_bytes() == (folder / WEIGHTS_FILE).read_bytes()


def test_both_objects_are_read_and_the_etag_told(store: Any, sources: Sources, staging: Staging, folder: Path) -> None:
    etag = put(store, folder)["ETag"].strip('"')
    assert sources.fetch(URI, staging) == f"{URI} (etag {etag})"
    assert_staged(staging, folder)


def test_of_a_bucket_with_versions_the_version_is_told(
    store: Any, sources: Sources, staging: Staging, folder: Path
) -> None:
    store.put_bucket_versioning(Bucket="bucket", VersioningConfiguration={"Status": "Enabled"})
    version = put(store, folder)["VersionId"]
    assert sources.fetch(URI, staging) == f"{URI} (version {version})"
    assert_staged(staging, folder)


class Meddling(Staging):
    """Whenever the weights are about to be written, replaces the adapter in the store by the next of `folders`."""

    def __init__(self, parent: Path, store: Any, folders: list[Path]) -> None:
        super().__init__(parent)
        self.store, self.folders = store, folders

    def writer(self, part: Part, max_bytes: int) -> Writer:
        if part == "weights" and self.folders:
            put(self.store, self.folders.pop(0))
        return super().writer(part, max_bytes)


def test_a_pair_that_is_replaced_between_the_reads_is_read_anew(store: Any, sources: Sources, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", seed=1, r=8)
    with Meddling(tmp_path, store, [other]) as staging:
        sources.fetch(URI, staging)
        assert_staged(staging, other)


def test_a_pair_that_is_replaced_all_the_time_is_a_failure(store: Any, sources: Sources, tmp_path: Path) -> None:
    others = [write_adapter(tmp_path / f"other{n}", seed=n, r=n) for n in (1, 2, 3)]
    with (
        Meddling(tmp_path, store, others) as staging,
        pytest.raises(SourceFailedError, match=f"checking {CONFIG_FILE} again: still being replaced after 3 tries$"),
    ):
        sources.fetch(URI, staging)


def test_what_is_not_in_the_store_is_not_found(store: Any, sources: Sources, staging: Staging) -> None:
    with pytest.raises(SourceNotFoundError, match=f"^s3://bucket/two: reading {CONFIG_FILE}: there is no such file"):
        sources.fetch("s3://bucket/two", staging)
    store.delete_object(Bucket="bucket", Key=f"team/one/{WEIGHTS_FILE}")
    store.put_object(Bucket="bucket", Key="team/one/adapter_model.bin", Body=b"pickle")
    with pytest.raises(SourceNotFoundError, match=READING + ".*never from adapter_model.bin"):
        sources.fetch(URI, staging)


@pytest.mark.usefixtures("store")
def test_a_missing_bucket_is_not_found(staging: Staging) -> None:
    sources = Sources(allowed=("s3://elsewhere",), folder=None, max_weights_bytes=1)
    with pytest.raises(SourceNotFoundError, match="there is no such bucket"):
        sources.fetch("s3://elsewhere/team/one", staging)


def test_weights_past_their_limit_are_too_large(store: Any, staging: Staging, folder: Path) -> None:
    size = (folder / WEIGHTS_FILE).stat().st_size
    Sources(allowed=("s3://bucket/team",), folder=None, max_weights_bytes=size).fetch(URI, staging)
    put(store, folder)
    with pytest.raises(AdapterTooLargeError, match=READING):
        Sources(allowed=("s3://bucket/team",), folder=None, max_weights_bytes=size - 1).fetch(URI, staging)


def error_body(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>hunter2</Message></Error>".encode()


@pytest.mark.parametrize(
    ("status", "code", "hint"),
    [
        (403, "AccessDenied", "access is denied; the credentials want s3:GetObject"),
        (403, "InvalidAccessKeyId", r"refused the credentials \(InvalidAccessKeyId\); set AWS_ACCESS_KEY_ID"),
        (400, "ExpiredToken", r"refused the credentials \(ExpiredToken\)"),
        (501, "NotImplemented", r"HTTP 501 \(NotImplemented\)"),
    ],
)
def test_a_refusal_says_what_to_set(
    broken_store: FakeHub, sources: Sources, staging: Staging, status: int, code: str, hint: str
) -> None:
    broken_store.put(WEIGHTS, Answer(status, body=error_body(code)))
    with pytest.raises(SourceFailedError, match=READING + f".*{hint}") as failure:
        sources.fetch(URI, staging)
    assert "hunter2" not in str(failure.value)
    assert broken_store.count(WEIGHTS_FILE) == 1


def test_a_body_that_breaks_off_is_read_anew(
    broken_store: FakeHub, sources: Sources, staging: Staging, folder: Path
) -> None:
    body = (folder / WEIGHTS_FILE).read_bytes()
    broken_store.put(WEIGHTS, Answer(body=body, fault="cut"), Answer(body=body, headers={"ETag": '"w2"'}))
    assert sources.fetch(URI, staging) == f"{URI} (etag w2)"
    assert_staged(staging, folder)
    broken_store.put(WEIGHTS, Answer(body=body, fault="cut"))
    with pytest.raises(SourceFailedError, match=READING + "the connection broke off after 3 tries$"):
        sources.fetch(URI, staging)


def test_a_store_that_hangs_times_out(
    broken_store: FakeHub, sources: Sources, staging: Staging, environment: pytest.MonkeyPatch
) -> None:
    environment.setattr(transfer, "READ_SECONDS", 1.0)
    broken_store.put(WEIGHTS, Answer(fault="hangs"))
    with pytest.raises(SourceFailedError, match=READING + "timed out after 3 tries$"):
        sources.fetch(URI, staging)
    assert broken_store.count(WEIGHTS_FILE) == 3


def test_a_file_without_end_is_cut_at_the_limit(broken_store: FakeHub, sources: Sources, staging: Staging) -> None:
    broken_store.put(WEIGHTS, Answer(fault="endless"))
    with pytest.raises(AdapterTooLargeError, match=READING):
        sources.fetch(URI, staging)
    assert staging.weights_path.stat().st_size <= 1 << 20


def test_an_etag_cannot_forge_a_line(broken_store: FakeHub, sources: Sources, staging: Staging, folder: Path) -> None:
    body = (folder / WEIGHTS_FILE).read_bytes()
    broken_store.put(WEIGHTS, Answer(body=body, headers={"ETag": '"\x1b[2J' + "a" * 500 + '"'}))
    source = sources.fetch(URI, staging)
    assert source.isascii()
    assert source.isprintable()
    assert len(source) < 200


def test_missing_credentials_are_told(
    broken_store: FakeHub, sources: Sources, staging: Staging, environment: pytest.MonkeyPatch
) -> None:
    environment.delenv("AWS_ACCESS_KEY_ID")
    environment.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(SourceFailedError, match="NoCredentialsError; set AWS_ACCESS_KEY_ID"):
        sources.fetch(URI, staging)
    assert not broken_store.seen


@pytest.mark.parametrize(("name", "value"), [("AWS_ENDPOINT_URL_S3", "no url"), ("AWS_PROFILE", "nobody")])
def test_settings_that_make_no_client_are_told(
    environment: pytest.MonkeyPatch, sources: Sources, staging: Staging, name: str, value: str
) -> None:
    environment.setenv(name, value)
    with pytest.raises(SourceFailedError, match=f"^{URI}: opening the store: .*check .*AWS_"):
        sources.fetch(URI, staging)


def test_a_store_that_is_down_is_a_failure(environment: pytest.MonkeyPatch, sources: Sources, staging: Staging) -> None:
    with run_fake_hub() as gone:
        environment.setenv("AWS_ENDPOINT_URL_S3", gone.url)
    with pytest.raises(SourceFailedError, match=r"EndpointConnectionError.*AWS_ENDPOINT_URL_S3") as failure:
        sources.fetch(URI, staging)
    assert gone.url not in str(failure.value)


def test_without_boto3_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, sources: Sources, staging: Staging) -> None:
    monkeypatch.delitem(sys.modules, "swaplora_adapters.sources.s3", raising=False)
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(SourceNotAllowedError, match=r"pip install 'swaplora\[s3\]'"):
        sources.fetch(URI, staging)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_store_that_drips_is_let_go_of_in_the_end(
    broken_store: FakeHub, sources: Sources, staging: Staging, monkeypatch: pytest.MonkeyPatch, is_stopped: bool
) -> None:
    broken_store.put(WEIGHTS, Answer(fault="drips"))
    if is_stopped:
        broken_store.once_dripping(sources.stop)
    else:
        monkeypatch.setattr(transfer, "time", broken_store.clock())
    error, reason = (
        (StoppingError, "the server is stopping") if is_stopped else (SourceFailedError, "not done after 600 s")
    )
    with pytest.raises(error, match=READING + reason):
        sources.fetch(URI, staging)
    assert broken_store.count(WEIGHTS_FILE) == 1
