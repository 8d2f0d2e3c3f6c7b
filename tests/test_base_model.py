"""Every architecture that goes through the attention interface: its logits are stock transformers' own."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from swaplora_adapters.apply.ops import torch_form
from swaplora_server.engine.base_model import load_base
from swaplora_server.engine.proof import UnsupportedModelError

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL | {"head_dim": 16},
    "mistral": SMALL | {"sliding_window": 5},
    "mixtral": SMALL | {"sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": SMALL | {"head_dim": 16, "sliding_window": 5, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "gemma3_text": SMALL
    | {"head_dim": 16, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": SMALL | {"sliding_window": 5},
    "olmo": SMALL,
    "olmo2": SMALL,
    "granite": SMALL | {"attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "smollm3": SMALL | {"no_rope_layers": [1, 0]},
    "cohere": SMALL,
    "starcoder2": SMALL | {"sliding_window": 5},
    "gpt_neox": SMALL,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 48},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
    },
    "gpt_oss": SMALL
    | {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def load(folder: Path) -> Any:
    return load_base(folder, device=torch.device("cpu"), dtype=torch.float32, op=torch_form.OP)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_architecture_passes_its_proof(model_type: str, tmp_path: Path) -> None:
    base = load(tiny.save_tiny_base(tmp_path, {"model_type": model_type, **ARCHITECTURES[model_type]}))
    assert base.shapes
    assert base.kv_bytes_per_token > 0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}, "bloom"),
        ({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2}, "mamba"),
    ],
)
def test_architecture_that_cannot_be_served_is_refused_with_the_reason(
    fields: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        load(tiny.save_tiny_base(tmp_path, fields))
