"""Writing an adapter that was computed here: the two files that PEFT reads, the same bytes for the same factors."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from swaplora_adapters.config.parse import MAX_CONFIG_BYTES, MAX_RANK
from swaplora_adapters.derive.lowrank import LowRank
from swaplora_adapters.errors import AdapterTooLargeError
from swaplora_adapters.files.names import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.store.staging import Writer


def write_adapter(
    folder: Path, modules: Mapping[str, LowRank], *, base_model: str | None, fan_in_fan_out: bool, max_bytes: int
) -> None:
    """Write a LoRA adapter of these factors, whose scaling is 1, in float32.

    Raises AdapterTooLargeError for more than `max_bytes` of weights or for a rank that no adapter may have, and
    StorageFullError.
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
    with Writer(folder / WEIGHTS_FILE, max_bytes) as writer:
        write_tensors(writer, tensors)


def write_tensors(writer: Writer, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of float32 tensors, in order of name."""
    header, position = {}, 0
    for name, tensor in sorted(tensors.items()):
        end = position + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # so that the tensors are aligned
    writer.write(len(raw).to_bytes(8, "little") + raw)
    for _, tensor in sorted(tensors.items()):
        writer.write(tensor.to(torch.float32).contiguous().numpy().data)


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
