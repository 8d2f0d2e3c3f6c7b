"""Adapters from the hub: pinned, bounded, tried again where that may help, and the token goes to nobody else."""

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from adapter_files import write_adapter
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

COMMIT, NEXT_COMMIT = "a" * 40, "b" * 40
TOKEN = "hf_hunter2"
URI = "hf://org/repo"
RESOLVING = "^hf://org/repo@main: resolving the revision: "
READING = f"^hf://org/repo@main: reading {WEIGHTS_FILE}: "
RESOLVED = "/api/models/org/repo/revision/main"
WEIGHTS = f"/org/repo/resolve/{COMMIT}/{WEIGHTS_FILE}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with one repository, asked by a client that has a token and tries again at once."""
    monkeypatch.setattr(transfer, "BACKOFF_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with run_fake_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        hub.put_repo("org/repo", "main", COMMIT, folder)
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def staging(tmp_path: Path) -> Iterator[Staging]:
    with Staging(tmp_path) as staging:
        yield staging


@pytest.fixture
def sources() -> Sources:
    return Sources(allowed=("hf://org",), folder=None, max_weights_bytes=1 << 20)


def assert_staged(staging: Staging, folder: Path) -> None:
    assert staging.config_path.read_bytes() == (folder / CONFIG_FILE).read_bytes()
    assert staging.weights_path.read_bytes() == (folder / WEIGHTS_FILE).read_bytes()


@pytest.mark.usefixtures("hub")
def test_a_repository_is_read_and_its_commit_told(sources: Sources, staging: Staging, folder: Path) -> None:
    assert sources.fetch(URI, staging) == f"{URI}@{COMMIT}"
    assert_staged(staging, folder)


def test_a_folder_at_a_revision_is_read(hub: FakeHub, sources: Sources, staging: Staging, folder: Path) -> None:
    hub.put_repo("org/repo", "v1.0", NEXT_COMMIT, folder, under="a%20b/c/")
    assert sources.fetch(f"{URI}@v1.0/a b/c", staging) == f"{URI}@{NEXT_COMMIT}/a b/c"
    assert_staged(staging, folder)


def test_only_the_two_files_are_asked_for(hub: FakeHub, sources: Sources, staging: Staging) -> None:
    sources.fetch(URI, staging)
    asked = [seen.path.partition("?")[0] for seen in hub.seen]
    assert asked == [RESOLVED, f"/org/repo/resolve/{COMMIT}/{CONFIG_FILE}", WEIGHTS]


def test_what_is_pushed_meanwhile_is_not_mixed_in(
    hub: FakeHub, sources: Sources, staging: Staging, folder: Path, tmp_path: Path
) -> None:
    other = write_adapter(tmp_path / "other", seed=1, r=8)

    class Meddling(Staging):
        def writer(self, part: Part, max_bytes: int) -> Writer:
            hub.put_repo("org/repo", "main", NEXT_COMMIT, other)
            return super().writer(part, max_bytes)

    with Meddling(tmp_path) as meddled:
        assert sources.fetch(URI, meddled) == f"{URI}@{COMMIT}"
        assert_staged(meddled, folder)
    assert sources.fetch(URI, staging) == f"{URI}@{NEXT_COMMIT}"
    assert_staged(staging, other)


def test_a_redirect_to_another_host_is_followed_without_the_token(
    hub: FakeHub, sources: Sources, staging: Staging, folder: Path
) -> None:
    with run_fake_hub() as elsewhere:
        elsewhere.put("/blob", Answer(body=(folder / WEIGHTS_FILE).read_bytes()))
        hub.put(WEIGHTS, Answer(302, headers={"Location": f"{elsewhere.url}/blob?signature=s3cr3t"}))
        sources.fetch(URI, staging)
        assert_staged(staging, folder)
        assert {seen.headers.get("Authorization") for seen in hub.seen} == {f"Bearer {TOKEN}"}
        [there] = elsewhere.seen
        assert TOKEN not in str(there.headers)


def test_a_signed_address_is_not_told(hub: FakeHub, sources: Sources, staging: Staging) -> None:
    with run_fake_hub() as elsewhere:
        elsewhere.put("/blob", Answer(403))
        hub.put(WEIGHTS, Answer(302, headers={"Location": f"{elsewhere.url}/blob?signature=s3cr3t"}))
        with pytest.raises(SourceFailedError, match=READING + r"access is denied \(HTTP 403\)") as failure:
            sources.fetch(URI, staging)
    assert "s3cr3t" not in str(failure.value)
    assert TOKEN not in str(failure.value)


def test_a_missing_repository_is_not_found(hub: FakeHub, sources: Sources, staging: Staging) -> None:
    hub.put(RESOLVED, Answer(404, headers={"X-Error-Code": "RepoNotFound"}))
    with pytest.raises(SourceNotFoundError, match=RESOLVING + "there is no such repository or revision"):
        sources.fetch(URI, staging)
    assert len(hub.seen) == 1


def test_401_is_a_miss_for_a_stranger_and_a_failure_with_a_token(
    hub: FakeHub, sources: Sources, staging: Staging, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put(RESOLVED, Answer(401))
    with pytest.raises(SourceFailedError, match=RESOLVING + r"access is denied \(HTTP 401\); check HF_TOKEN"):
        sources.fetch(URI, staging)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "none"))
    with pytest.raises(SourceNotFoundError, match="wants HF_TOKEN"):
        sources.fetch(URI, staging)


def test_a_gated_repository_says_so(hub: FakeHub, sources: Sources, staging: Staging) -> None:
    hub.put(RESOLVED, Answer(403, headers={"X-Error-Code": "GatedRepo"}))
    with pytest.raises(SourceFailedError, match="gated; accept its terms"):
        sources.fetch(URI, staging)


def test_a_repository_without_safetensors_is_not_found(hub: FakeHub, sources: Sources, staging: Staging) -> None:
    hub.put(f"/org/repo/resolve/{COMMIT}/adapter_model.bin", Answer(body=b"pickle"))
    hub.put(WEIGHTS, Answer(404, headers={"X-Error-Code": "EntryNotFound"}))
    with pytest.raises(SourceNotFoundError, match=READING + ".*never from adapter_model.bin"):
        sources.fetch(URI, staging)
    assert not hub.count("adapter_model.bin")


def test_a_renamed_repository_is_not_followed_to_where_nobody_allowed_it(
    hub: FakeHub, sources: Sources, staging: Staging, folder: Path
) -> None:
    hub.put_repo("evil/repo", "main", COMMIT, folder)
    hub.put(RESOLVED, Answer(307, headers={"Location": "/api/models/evil/repo/revision/main"}))
    with pytest.raises(SourceNotAllowedError, match="the hub now has it as 'evil/repo'"):
        sources.fetch(URI, staging)


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("path", [RESOLVED, WEIGHTS], ids=["revision", "weights"])
def test_a_passing_error_is_tried_again_three_times_in_all(
    hub: FakeHub, sources: Sources, staging: Staging, folder: Path, path: str, status: int
) -> None:
    sound = hub.answer(path, {})
    hub.put(path, Answer(status), Answer(status), sound)
    sources.fetch(URI, staging)
    assert_staged(staging, folder)
    hub.put(path, Answer(status), Answer(status), Answer(status), sound)
    with pytest.raises(SourceFailedError, match=f": HTTP {status} after 3 tries$"):
        sources.fetch(URI, staging)


@pytest.mark.parametrize("status", [400, 403, 404, 410, 416])
def test_any_other_refusal_is_not_tried_again(hub: FakeHub, sources: Sources, staging: Staging, status: int) -> None:
    hub.put(WEIGHTS, Answer(status))
    with pytest.raises((SourceFailedError, SourceNotFoundError)):
        sources.fetch(URI, staging)
    assert hub.count(WEIGHTS_FILE) == 1


def test_a_body_that_breaks_off_is_read_anew(hub: FakeHub, sources: Sources, staging: Staging, folder: Path) -> None:
    body = (folder / WEIGHTS_FILE).read_bytes()
    hub.put(WEIGHTS, Answer(body=body, fault="cut"), Answer(body=body))
    sources.fetch(URI, staging)
    assert_staged(staging, folder)
    hub.put(WEIGHTS, Answer(body=body, fault="cut"))
    with pytest.raises(SourceFailedError, match=READING + "the connection failed or broke off after 3 tries$"):
        sources.fetch(URI, staging)


def test_a_hub_that_hangs_times_out(
    hub: FakeHub, sources: Sources, staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "READ_SECONDS", 1.0)
    hub.put(WEIGHTS, Answer(fault="hangs"))
    with pytest.raises(SourceFailedError, match=READING + "timed out after 3 tries$"):
        sources.fetch(URI, staging)
    assert hub.count(WEIGHTS_FILE) == 3


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_file_without_end_is_cut_at_the_limit(hub: FakeHub, sources: Sources, staging: Staging, file: str) -> None:
    hub.put(f"/org/repo/resolve/{COMMIT}/{file}", Answer(fault="endless"))
    with pytest.raises(AdapterTooLargeError, match=f"reading {file}"):
        sources.fetch(URI, staging)
    assert (staging.path / file).stat().st_size <= 1 << 20
    assert hub.count(file) == 1


def test_an_answer_without_end_is_cut(hub: FakeHub, sources: Sources, staging: Staging) -> None:
    hub.put(RESOLVED, Answer(fault="endless"))
    with pytest.raises(SourceFailedError, match=RESOLVING + "the answer is longer than"):
        sources.fetch(URI, staging)


def test_a_length_that_is_declared_is_not_believed_beyond_what_comes(
    hub: FakeHub, sources: Sources, staging: Staging, folder: Path
) -> None:
    body = (folder / WEIGHTS_FILE).read_bytes()
    hub.put(WEIGHTS, Answer(body=body, fault="short"))
    sources.fetch(URI, staging)  # a torn file, which intake refuses by its header
    assert staging.weights_path.read_bytes() == body[: len(body) // 2]


def test_a_compressed_answer_is_refused(hub: FakeHub, sources: Sources, staging: Staging) -> None:
    hub.put(WEIGHTS, Answer(body=b"\x1f\x8b", headers={"Content-Encoding": "gzip"}))
    with pytest.raises(SourceFailedError, match="compressed"):
        sources.fetch(URI, staging)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[" * 100_000,
        b"null",
        json.dumps({"id": "org/repo"}).encode(),
        json.dumps({"id": "org/repo", "sha": "../../x"}).encode(),
        json.dumps({"id": 1, "sha": COMMIT}).encode(),
    ],
)
def test_an_answer_that_names_no_commit_is_a_failure(
    hub: FakeHub, sources: Sources, staging: Staging, body: bytes
) -> None:
    hub.put(RESOLVED, Answer(body=body))
    with pytest.raises(SourceFailedError, match=RESOLVING + "the answer names no commit; check HF_ENDPOINT"):
        sources.fetch(URI, staging)


def test_a_hub_that_is_down_is_a_failure(
    hub: FakeHub, sources: Sources, staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_fake_hub() as gone:
        url = gone.url
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    with pytest.raises(SourceFailedError, match=RESOLVING + "the connection failed or broke off after 3 tries$"):
        sources.fetch(URI, staging)
    assert not hub.seen


def test_offline_mode_is_told(
    hub: FakeHub, sources: Sources, staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceFailedError, match=RESOLVING + "HF_HUB_OFFLINE is set"):
        sources.fetch(URI, staging)
    assert not hub.seen


def test_what_the_operator_wrote_needs_no_prefix(hub: FakeHub, staging: Staging, folder: Path) -> None:
    sources = Sources(allowed=(), folder=None, max_weights_bytes=1 << 20)
    with pytest.raises(SourceNotAllowedError):
        sources.fetch(URI, staging)
    assert not hub.seen
    sources.fetch(URI, staging, is_operators=True)
    assert_staged(staging, folder)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_hub_that_drips_is_let_go_of_in_the_end(
    hub: FakeHub, sources: Sources, staging: Staging, monkeypatch: pytest.MonkeyPatch, is_stopped: bool
) -> None:
    hub.put(WEIGHTS, Answer(fault="drips"))
    if is_stopped:
        hub.once_dripping(sources.stop)
    else:
        monkeypatch.setattr(transfer, "time", hub.clock())
    error, reason = (
        (StoppingError, "the server is stopping") if is_stopped else (SourceFailedError, "not done after 600 s")
    )
    with pytest.raises(error, match=READING + reason):
        sources.fetch(URI, staging)
    assert hub.count(WEIGHTS_FILE) == 1
