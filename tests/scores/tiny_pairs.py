"""Tiny cross-encoders, and stock transformers with PEFT as what their scores are held against."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tiny
from tiny_encoders import save_encoder

DECODER = "llama"


def save_pair_base(folder: Path, architecture: str, **config: Any) -> Path:
    """With a tokenizer that tells a pair's texts apart where the model does; `config` goes into config.json."""
    if architecture == DECODER:
        return tiny.save_tiny_base(folder)
    save_encoder(folder, architecture)
    if architecture == "bert":
        _edit(folder / "tokenizer_config.json", model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    _edit(folder / "config.json", **config)
    return folder


def save_whole_classifier(folder: Path, num_labels: int) -> Path:
    """A BERT that was saved with a head behind it."""
    save_pair_base(folder, "bert")
    names = {str(number): f"kind {number}" for number in range(num_labels)}
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, id2label=names)
    with torch.no_grad():
        model.classifier.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(num_labels))
    model.save_pretrained(folder)
    return folder


def _edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


class PairOracle:
    """Stock transformers in float32 with one cross-encoder, which may be the base itself."""

    def __init__(self, base: Path, adapter: Path | None = None) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForSequenceClassification.from_pretrained(
            base, dtype=torch.float32, attn_implementation="eager", num_labels=1
        )
        self._model = (model if adapter is None else PeftModel.from_pretrained(model, str(adapter))).eval()

    @torch.no_grad()
    def logit(self, query: str, document: str, options: Mapping[str, Any] | None = None) -> float:
        """As transformers encodes the pair."""
        encoded = self.tokenizer(query, document, return_tensors="pt", **(options or {}))
        return float(self._model(**encoded).logits[0, 0])

    def score(self, query: str, document: str, options: Mapping[str, Any] | None = None) -> float:
        """As a CrossEncoder of sentence-transformers has it of one label."""
        return float(torch.sigmoid(torch.tensor(self.logit(query, document, options))))
