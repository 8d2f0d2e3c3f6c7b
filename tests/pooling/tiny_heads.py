"""Adapters that classify, made by PEFT with heads of their own, and PEFT as what their logits are held against."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedModel

Vector = NDArray[np.float32]
_MODELS = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}
# what lies behind the base and is nothing of it; PEFT saves `classifier` and `score` without being asked
OWN: Mapping[tuple[str, str], Sequence[str]] = {
    ("SEQ_CLS", "distilbert"): ["pre_classifier"],
    ("SEQ_CLS", "modernbert"): ["head"],
    ("SEQ_CLS", "deberta"): ["pooler"],
    ("SEQ_CLS", "deberta-v2"): ["pooler"],
    ("TOKEN_CLS", "modernbert"): ["head"],
}


def save_classifier(
    folder: Path, base: Path, architecture: str, *, seed: int, num_labels: int, task: str = "SEQ_CLS", **fields: Any
) -> Path:
    """Of seeded values, on every linear and in all of the head."""
    model = _model(base, task, num_labels)
    given = {"target_modules": "all-linear", "modules_to_save": OWN.get((task, architecture)), **fields}
    if task == "TOKEN_CLS":  # whose head PEFT would target and save at once
        given.setdefault("exclude_modules", ["classifier", "score"])
    config = LoraConfig(r=4, lora_alpha=9, task_type=task, **given)
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                strength = 0.3 / parameter.shape[-1] ** 0.5 if "lora_" in name else 0.3
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * strength)
    peft_model.save_pretrained(folder)
    return folder


class ClassOracle:
    """Stock transformers in float32 with one classifier."""

    def __init__(self, base: Path, adapter: Path, num_labels: int, task: str = "SEQ_CLS") -> None:
        self._model = PeftModel.from_pretrained(_model(base, task, num_labels), str(adapter)).eval()

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int]) -> Vector:
        """[num_labels], or of tokens [num_tokens, num_labels]."""
        logits: Vector = self._model(torch.tensor([list(token_ids)])).logits[0].numpy()
        return logits


def _model(base: Path, task: str, num_labels: int) -> PreTrainedModel:
    model: PreTrainedModel = _MODELS[task].from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager", num_labels=num_labels
    )
    return model
