"""PEFT, in the test's process, as the reference for what a decoder's last hidden states are."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoModelForCausalLM

Vector = NDArray[np.float32]


class HiddenOracle:
    """Stock transformers in float32, with a sum of adapters, one of them, or none."""

    def __init__(
        self, base: Path, adapter: Path | None = None, scale: float = 1.0, other: tuple[Path, float] | None = None
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
        for folder, factor in [(adapter, scale), other or (None, 1.0)]:
            if folder is not None and (factor != 1.0 or other is not None):
                model = _added(model, folder, factor)
            elif folder is not None:
                model = PeftModel.from_pretrained(model, str(folder))
        self._model = model.eval()

    @torch.no_grad()
    def hidden(self, token_ids: list[int]) -> Vector:
        """[len(token_ids), hidden_size]: behind the last norm."""
        output = self._model(torch.tensor([token_ids]), output_hidden_states=True)
        states: Vector = output.hidden_states[-1][0].numpy()
        return states

    def embedding(self, token_ids: list[int]) -> Vector:
        """The last token's, of length 1."""
        last = self.hidden(token_ids)[-1]
        embedding: Vector = last / np.linalg.norm(last)
        return embedding


def _added(model: torch.nn.Module, folder: Path, factor: float) -> torch.nn.Module:
    """`model` with `factor` times an adapter's delta in its weights."""
    peft_model = PeftModel.from_pretrained(model, str(folder))
    for module in peft_model.modules():
        if hasattr(module, "scale_layer"):
            module.set_scale("default", factor)
    merged: torch.nn.Module = peft_model.merge_and_unload()
    return merged
