"""Tiny models made from a config, a byte tokenizer, seeded adapters: all that a test needs, nothing downloaded."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 259
BOS, EOS, PAD = 256, 257, 258
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, so that any text round-trips; ids 256-258 are bos, eos and pad."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_model(overrides: Mapping[str, Any] = LLAMA, seed: int = 0) -> PreTrainedModel:
    """A randomly initialised fp32 model whose weights are large enough that its logits differ between tokens."""
    fields = {"vocab_size": VOCAB_SIZE, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, **overrides}
    config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.15)
            elif name.endswith("bias") or "sinks" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def save_tiny_base(folder: Path, overrides: Mapping[str, Any] = LLAMA, seed: int = 0) -> Path:
    """Write a tiny model and the byte tokenizer into `folder`, as `from_pretrained` reads them."""
    tiny_model(overrides, seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(
    folder: Path,
    base: Path,
    *,
    seed: int,
    rank: int = 4,
    alpha: float | None = None,
    target_modules: Sequence[str] = ALL_LINEAR,
    strength: float = 0.3,
    **fields: Any,
) -> Path:
    """Make an adapter with real PEFT code, fill A and B with seeded non-zero values, and save it to `folder`.

    alpha is 2·rank + 1 unless given, so that a server that forgets the scale cannot pass by luck.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank + 1 if alpha is None else alpha,
        target_modules=list(target_modules),
        task_type="CAUSAL_LM",
        **fields,
    )
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) * strength / parameter.shape[-1] ** 0.5
                )
    peft_model.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **fields: Any) -> None:
    """Overwrite fields of `adapter_config.json` in place."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
