"""Tiny encoders of every architecture that is served, adapters for them, and PEFT as what they are held against."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import processors
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel

import tiny

Vector = NDArray[np.float32]
CLS, SEP = tiny.BOS, tiny.EOS
_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_ROBERTA = {**_SHAPE, "type_vocab_size": 1, "pad_token_id": 1, "max_position_embeddings": 130}
_DEBERTA = {
    **_SHAPE,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "bert": _SHAPE,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128},
    "deberta": _DEBERTA,
    "deberta-v2": {**_DEBERTA, "position_buckets": 16, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    "modernbert": {**_SHAPE, "num_hidden_layers": 3, "local_attention": 16, "global_attn_every_n_layers": 3},
}


def tiny_encoder(architecture: str, seed: int = 0) -> PreTrainedModel:
    """Randomly initialised, of weights large enough that its states differ between tokens."""
    ids = {"bos_token_id": CLS, "eos_token_id": SEP, "cls_token_id": CLS, "sep_token_id": SEP, "pad_token_id": tiny.PAD}
    fields = {"vocab_size": tiny.VOCAB_SIZE, **ids, **ARCHITECTURES[architecture]}
    torch.manual_seed(seed)
    model = AutoModel.from_config(CONFIG_MAPPING[architecture](**fields), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.15)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def save_encoder(folder: Path, architecture: str, seed: int = 0) -> Path:
    """As `from_pretrained` reads it, with a tokenizer that puts each text between two special tokens."""
    tiny_encoder(architecture, seed).save_pretrained(folder)
    tokenizer = tiny.byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>",
        pair="<|bos|> $A <|eos|> $B:1 <|eos|>:1",
        special_tokens=[("<|bos|>", CLS), ("<|eos|>", SEP)],
    )
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


def save_feature_adapter(folder: Path, base: Path, seed: int, rank: int = 4, **fields: Any) -> Path:
    """Made by PEFT on the encoder without a head, of seeded values, on every linear."""
    encoder = AutoModel.from_pretrained(base, dtype=torch.float32)
    given = {"target_modules": "all-linear", **fields}
    if hasattr(encoder, "pooler"):
        given.setdefault("exclude_modules", ["pooler.dense"])
    config = LoraConfig(r=rank, lora_alpha=2 * rank + 1, task_type="FEATURE_EXTRACTION", **given)
    model = get_peft_model(encoder, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return folder


class EncoderOracle:
    """Stock transformers in float32, with one adapter or none."""

    def __init__(self, base: Path, adapter: Path | None = None) -> None:
        model = AutoModel.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
        self._model = (model if adapter is None else PeftModel.from_pretrained(model, str(adapter))).eval()

    @torch.no_grad()
    def states(self, token_ids: Sequence[int]) -> Vector:
        """[len(token_ids), hidden_size]"""
        states: Vector = self._model(torch.tensor([list(token_ids)])).last_hidden_state[0].numpy()
        return states

    def embedding(self, token_ids: Sequence[int]) -> Vector:
        """The mean, of length 1."""
        mean = self.states(token_ids).mean(0)
        embedding: Vector = mean / np.linalg.norm(mean)
        return embedding


def save_sentence_config(folder: Path, pooling: Mapping[str, Any], max_tokens: int | None, *modules: str) -> None:
    """What sentence-transformers writes beside a model."""
    listed = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for number, module in enumerate(modules, 1):
        path = f"{number}_{module}"
        listed.append(
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{module}"}
        )
        (folder / path).mkdir(exist_ok=True)
        (folder / path / "config.json").write_text(json.dumps(pooling if module == "Pooling" else {}))
    (folder / "modules.json").write_text(json.dumps(listed))
    if max_tokens is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_tokens}))
