"""Tiny configs of the architectures that go through the attention interface, by model type."""

from typing import Any

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
