"""Adapter files made by hand, sound or broken, for the base that `tiny.LLAMA` describes: no PEFT, no model, fast."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.fit.base import LayerShapes, LinearShape

_LAYER = {
    "self_attn.q_proj": LinearShape(32, 32),
    "self_attn.k_proj": LinearShape(32, 16),
    "self_attn.v_proj": LinearShape(32, 16),
    "self_attn.o_proj": LinearShape(32, 32),
    "mlp.gate_proj": LinearShape(32, 48),
    "mlp.up_proj": LinearShape(32, 48),
    "mlp.down_proj": LinearShape(48, 32),
}
SHAPES = {f"model.layers.{layer}.{name}": shape for layer in (0, 1) for name, shape in _LAYER.items()} | {
    "lm_head": LinearShape(32, 259)
}
LAYERS = LayerShapes(SHAPES)  # of which nothing but the linears' shapes is known
CONFIG: Mapping[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj"]}


def config_bytes(**fields: Any) -> bytes:
    """`CONFIG` with some fields changed, as a file's bytes."""
    return json.dumps({**CONFIG, **fields}).encode()


def factors(targets: Sequence[str] = ("q_proj", "v_proj"), rank: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Seeded A and B for every module of `SHAPES` whose last name is in `targets`, under PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, shape in SHAPES.items():
        if path.rpartition(".")[2] in targets:
            prefix = f"base_model.model.{path}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, shape.in_features, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(shape.out_features, rank, generator=generator)
    return tensors


def write_adapter(folder: Path, tensors: Mapping[str, Tensor] | None = None, seed: int = 0, **fields: Any) -> Path:
    """Write both files into `folder`, made if need be: `CONFIG` with `fields`, and `tensors` or ones that fit."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_bytes(config_bytes(**fields))
    save_file(dict(factors(seed=seed) if tensors is None else tensors), folder / WEIGHTS_FILE)
    return folder


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    """The frame of a safetensors file around any header, JSON-encoded unless it is bytes already."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data
