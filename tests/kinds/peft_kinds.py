"""Every kind of adapter that PEFT's LoRA code saves, made by that code on tiny bases, no trained value at its init."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import nn
from transformers import AutoModelForCausalLM

import tiny

BASES: Mapping[str, Mapping[str, Any]] = {
    "llama": tiny.LLAMA,  # with a tied head
    "qwen2": {**tiny.LLAMA, "model_type": "qwen2", "tie_word_embeddings": False},  # with biases, and a head of its own
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mixtral": {
        "model_type": "mixtral",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
    },
}


class Recipe(NamedTuple):
    """A base of `BASES`, the fields of the config, and what a card calls it."""

    base: str
    fields: Mapping[str, Any]
    kinds: tuple[str, ...]


def _lora(base: str, *kinds: str, **fields: Any) -> Recipe:
    return Recipe(base, {"target_modules": ["q_proj", "down_proj"], **fields}, ("lora", *kinds))


_QV = ["q_proj", "v_proj"]
KINDS: Mapping[str, Recipe] = {
    "plain": _lora("llama"),
    "head": _lora("llama", target_modules=["lm_head", "q_proj"]),
    "embedding": _lora("llama", "embedding", target_modules=["embed_tokens", "v_proj"]),
    "embedding and head": _lora("llama", "embedding", target_modules=["embed_tokens", "lm_head"]),
    "tied embedding": _lora("llama", "embedding", target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    "wte": _lora("gpt2", "embedding", target_modules=["wte", "c_attn"], fan_in_fan_out=True),
    "lora_only": _lora("qwen2", "bias", bias="lora_only"),
    "all biases": _lora("qwen2", "bias", bias="all"),
    "all biases, norms": _lora("gpt2", "bias", target_modules=["c_attn"], bias="all", fan_in_fan_out=True),
    "saved norm with biases": _lora(
        "gpt2", "bias", "modules_to_save", target_modules=["c_attn"], bias="all", modules_to_save=["ln_f"]
    ),
    "lora_bias": _lora("qwen2", "bias", target_modules=["q_proj", "o_proj"], lora_bias=True),
    "lora_bias and all": _lora("qwen2", "bias", target_modules=["q_proj", "o_proj"], lora_bias=True, bias="all"),
    "dora": _lora("qwen2", "dora", use_dora=True),
    "dora, patterns": _lora(
        "llama", "dora", use_dora=True, use_rslora=True, rank_pattern={"q_proj": 7}, alpha_pattern={"down_proj": 3}
    ),
    "dora and biases": _lora("qwen2", "dora", "bias", target_modules=_QV, use_dora=True, bias="all"),
    "dora, conv1d": _lora("gpt2", "dora", target_modules=["c_attn", "c_proj"], use_dora=True, fan_in_fan_out=True),
    "dora, head": _lora("llama", "dora", target_modules=["lm_head"], use_dora=True),
    "dora, embedding": _lora("llama", "dora", "embedding", target_modules=["embed_tokens"], use_dora=True),
    "saved norms": _lora("llama", "modules_to_save", modules_to_save=["norm"]),
    "saved embedding": _lora("llama", "modules_to_save", modules_to_save=["embed_tokens"]),
    "saved embedding, tied": _lora(
        "llama", "modules_to_save", modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "saved head": _lora("llama", "modules_to_save", modules_to_save=["lm_head"]),
    "saved mlp": _lora("qwen2", "modules_to_save", modules_to_save=["mlp"]),
    "saved attention": _lora("qwen2", "modules_to_save", modules_to_save=["self_attn"]),
    "saved conv1d": _lora("gpt2", "modules_to_save", target_modules=["c_fc"], modules_to_save=["attn.c_proj"]),
    "tokens": _lora("qwen2", "trainable_tokens", trainable_token_indices=[200, 3, 71]),
    "tokens, tied": _lora("llama", "trainable_tokens", trainable_token_indices=[200, 3, 71]),
    "tokens, tied, wte": _lora("gpt2", "trainable_tokens", target_modules=["c_attn"], trainable_token_indices=[9, 3]),
    "tokens, tied head with factors": _lora(
        "llama", "trainable_tokens", target_modules=["lm_head"], trainable_token_indices=[200, 3]
    ),
    "tokens, two lists": _lora(
        "llama", "trainable_tokens", trainable_token_indices={"embed_tokens": [200, 3], "lm_head": [7]}
    ),
    "tokens, one list twice": _lora(
        "llama", "trainable_tokens", trainable_token_indices={"embed_tokens": [200, 3], "lm_head": [200, 3]}
    ),
    "tokens, head alone": _lora("qwen2", "trainable_tokens", trainable_token_indices={"lm_head": [200, 3]}),
    "adalora": Recipe("llama", {"target_modules": _QV, "init_r": 5, "total_step": 10}, ("adalora",)),
    "adalora, pruned": Recipe(
        "qwen2",
        {
            "target_modules": ["q_proj"],
            "init_r": 3,
            "total_step": 10,
            "bias": "lora_only",
            "rank_pattern": {
                "model.layers.0.self_attn.q_proj.lora_E": [True, False, True],
                "model.layers.1.self_attn.q_proj.lora_E": [False, False, False],
            },
        },
        ("adalora", "bias"),
    ),
    "qalora": Recipe(
        "llama", {"target_modules": ["q_proj", "down_proj"], "use_qalora": True, "qalora_group_size": 8}, ("qalora",)
    ),
    "alora": _lora("llama", "alora", alora_invocation_tokens=[60, 97, 62]),
    "experts": _lora(
        "mixtral",
        "target_parameters",
        target_modules=["v_proj"],
        target_parameters=["experts.down_proj", "experts.gate_up_proj", "gate.weight"],
        rank_pattern={"experts.gate_up_proj": 3},
    ),
    "parameters of linears": _lora(
        "llama", "target_parameters", target_modules=[], target_parameters=["q_proj.weight"]
    ),
    "parameters of conv1d": _lora("gpt2", "target_parameters", target_modules=[], target_parameters=["c_proj.weight"]),
    "parameter of the embedding": _lora(
        "qwen2", "target_parameters", target_modules=["q_proj"], target_parameters=["embed_tokens.weight"]
    ),
}
# PEFT saves it, and reads it on GPTQ bases alone: see `pool`.
_QALORA = "qalora"


def save_base(name: str, folder: Path) -> Path:
    """One of `BASES`; the seed is such that no two of its norms or biases are alike."""
    model = tiny.tiny_model(BASES[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.1)
    model.save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return folder


def make(kind: str, base_folder: Path, out_folder: Path, seed: int) -> Path:
    """Save an adapter of a kind of `KINDS` for its base, all that is trained in it random but for the seed."""
    model = wrapped(kind, base_folder)
    generator = torch.Generator().manual_seed(seed)
    names = {name for name, parameter in model.named_parameters() if _is_trained(kind, name, parameter)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(out_folder)
    return out_folder


def wrapped(kind: str, base_folder: Path) -> PeftModel:
    _, fields, kinds = KINDS[kind]
    """The model that `make` trains, at its init."""
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    given = {"lora_alpha": 9, "task_type": "CAUSAL_LM", **fields}
    if kinds[0] == "adalora":
        masks = given.pop("rank_pattern", None)  # found while it trains
        model = get_peft_model(base, AdaLoraConfig(**given))
        model.peft_config["default"].rank_pattern = masks
        return model
    model = get_peft_model(base, LoraConfig(**{"r": 4, **given}))
    if kind == _QALORA:
        pool(model)
    return model


def pool(model: PeftModel) -> None:
    """Make QALoRA of plain LoRA, as PEFT does where the base is quantised by GPTQ."""
    config = model.peft_config["default"]
    for module in model.modules():
        if hasattr(module, "lora_variant"):
            module.lora_variant["default"] = QALoraLinearVariant()
            QALoraLinearVariant.init(module, "default", config=config)


def _is_trained(kind: str, name: str, parameter: nn.Parameter) -> bool:
    """PEFT has QALoRA's new factors trained as well, though their `requires_grad` says so by accident only."""
    return parameter.requires_grad or (kind == _QALORA and "lora_" in name)
