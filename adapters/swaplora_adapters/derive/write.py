"""Writing an adapter that was computed here: the two files that PEFT reads, the same bytes for the same factors."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from swaplora_adapters.config.parse import MAX_CONFIG_BYTES, MAX_RANK
from swaplora_adapters.derive.lowrank import LowRank
from swaplora_adapters.errors import AdapterTooLargeError, StorageFailedError
from swaplora_adapters.files.disk import raising_storage_errors
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.store.staging import Writer

_MAX_ENTRY_BYTES = 1024  # more than any of these tensors takes in the header


def write_adapter(
    folder: Path, modules: Mapping[str, LowRank], *, base_model: str | None, fan_in_fan_out: bool, max_bytes: int
) -> None:
    """Write a LoRA adapter of these factors, whose scaling is 1, in float32.

    Raises AdapterTooLargeError for more than `max_bytes` of weights or for a rank that no adapter may have,
    StorageFullError and StorageFailedError.
    """
    for path, module in modules.items():
        if module.rank > MAX_RANK:
            raise AdapterTooLargeError(f"{path} would need rank {module.rank}, an adapter has at most {MAX_RANK}")
    config = _config({path: module.rank for path, module in modules.items()}, base_model, fan_in_fan_out)
    with Writer(folder / CONFIG_FILE, MAX_CONFIG_BYTES) as writer:
        writer.write(json.dumps(config, indent=2).encode())
    tensors = {
        f"base_model.model.{path}.lora_{letter}.weight": factor
        for path, module in modules.items()
        for letter, factor in (("A", module.lora_A), ("B", module.lora_B))
    }
    _write_tensors(folder / WEIGHTS_FILE, tensors, max_bytes)


def _write_tensors(path: Path, tensors: dict[str, Tensor], max_bytes: int) -> None:
    """A safetensors file, durable. What is too large is not begun, unless it is for the header alone."""
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    if num_bytes <= max_bytes:
        with raising_storage_errors():
            num_bytes = _save(path, tensors)
    if num_bytes > max_bytes:
        raise AdapterTooLargeError(f"{path.name} is larger than {max_bytes} bytes")


def _save(path: Path, tensors: dict[str, Tensor]) -> int:
    """The file's size. Raises OSError and StorageFailedError."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # it has no errno: to ask for the room again has
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, sum(t.nbytes + _MAX_ENTRY_BYTES for t in tensors.values()))
        raise StorageFailedError(f"the disk that holds the adapters failed: {path.name} cannot be written") from error
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _config(ranks: Mapping[str, int], base_model: str | None, fan_in_fan_out: bool) -> dict[str, object]:
    """Ranks that differ from the most common one are listed, longer paths first: the first that matches an end wins."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: ranks[path] for path in sorted(ranks, key=lambda path: (-len(path), path)) if ranks[path] != common}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "inference_mode": True,
    }
