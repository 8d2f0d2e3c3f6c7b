"""Adapters as earlier versions, transformers 4 and other trainers write them, whose files PEFT still reads."""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE

_SHAPE = {field: value for field, value in tiny.LLAMA.items() if field not in ("model_type", "tie_word_embeddings")}


def own_state(name: str) -> str:
    """As `state_dict()` has it, whose adapter is called "default"."""
    name = re.sub(r"(lora_[AB])\.(weight|bias)$", r"\1.default.\2", name)
    name = re.sub(r"lora_magnitude_vector$", "lora_magnitude_vector.default.weight", name)
    return re.sub(r"(lora_embedding_[AB]|lora_[ABE])$", r"\1.default", name)


def vector_weights(name: str) -> str:
    """DoRA's vectors as they are called in a module of their own."""
    return re.sub(r"lora_magnitude_vector$", "lora_magnitude_vector.weight", name)


SPELLINGS: Mapping[str, Callable[[str], str]] = {
    "own state": own_state,
    "vectors as weights": vector_weights,
    "another adapter's": lambda name: own_state(name).replace(".default", ".mine"),
    "without prefix": lambda name: name.removeprefix("base_model.model."),
    "own state without prefix": lambda name: own_state(name).removeprefix("base_model.model."),
    "half a prefix": lambda name: name.removeprefix("base_model."),
    "of DistributedDataParallel": lambda name: f"module.{name}",
    "of FSDP": lambda name: f"_fsdp_wrapped_module.{name}",
    "of FSDP's layers": lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "of torch.compile": lambda name: f"_orig_mod.{name}",
    "of a compiled base": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
}


def rewritten(source: Path, folder: Path, rename: Callable[[str], str] = str, **fields: Any) -> Path:
    """A copy with other names, and other fields in its config."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | fields))
    return folder


@torch.no_grad()
def peft_logits(base: Path, adapter: Path, ids: Tensor) -> Tensor | None:
    """What PEFT computes, or None where it cannot load the files."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    try:
        wrapped = PeftModel.from_pretrained(model, str(adapter))
    except (KeyError, ValueError, RuntimeError):
        return None
    logits: Tensor = wrapped.eval()(ids).logits
    return logits


class Experts(NamedTuple):
    """A base of experts that transformers 5 has fused, and what version 4 called them."""

    fields: Mapping[str, Any]
    block: str
    gate: str
    up: str
    down: str
    width: int

    @property
    def names(self) -> list[str]:
        return [self.gate, self.up, self.down]


EXPERTS: Mapping[str, Experts] = {
    "mixtral": Experts(
        {**_SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}, "block_sparse_moe", "w1", "w3", "w2", 48
    ),
    "qwen3_moe": Experts(
        {**_SHAPE, "moe_intermediate_size": 24, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2},
        *("mlp", "gate_proj", "up_proj", "down_proj", 24),
    ),
    "olmoe": Experts(
        {**_SHAPE, "num_experts": 4, "num_experts_per_tok": 2}, "mlp", "gate_proj", "up_proj", "down_proj", 48
    ),
}


def expert_tensors(kind: str, targets: Sequence[str], ranks: Mapping[str, int] | None = None) -> dict[str, Tensor]:
    """Random factors of both layers for last names of version 4, the attention's among them; rank 4 unless given."""
    of = EXPERTS[kind]
    sizes = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32), "gate": (4, 32)}
    sizes |= {of.gate: (of.width, 32), of.up: (of.width, 32), of.down: (32, of.width)}
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(2):
        for name in targets:
            rank = (ranks or {}).get(name, 4)
            for path in _paths(of, name):
                prefix = f"base_model.model.model.layers.{layer}.{path}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, sizes[name][1], generator=generator) * 0.3
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(sizes[name][0], rank, generator=generator) * 0.3
    return tensors


def _paths(of: Experts, name: str) -> list[str]:
    if name in of.names:
        return [f"{of.block}.experts.{expert}.{name}" for expert in range(4)]
    return [f"{of.block}.gate" if name == "gate" else f"self_attn.{name}"]


def save_experts(folder: Path, tensors: Mapping[str, Tensor], **fields: Any) -> Path:
    """With the config that PEFT wrote beside transformers 4."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **fields}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    save_file(dict(tensors), folder / WEIGHTS_FILE)
    return folder
