"""PEFT as the reference for every kind of `peft_kinds`, and for sums of what only adds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peft_kinds
from oracle import Oracle
from swaplora_adapters.files.naming import WEIGHTS_FILE


class KindOracle(Oracle):
    """Stock transformers with an adapter of one of `peft_kinds.KINDS`, as PEFT computes it."""

    def __init__(self, base: Path, adapter: Path, kind: str) -> None:
        """PEFT itself reads QALoRA on GPTQ bases alone, so that its factors are put where it trained them."""
        super().__init__(base, None if kind == "qalora" else adapter)
        if kind == "qalora":
            self._model = peft_kinds.wrapped(kind, base).eval()
            factors = load_file(adapter / WEIGHTS_FILE)
            state = {name.replace(".weight", ".default.weight"): tensor for name, tensor in factors.items()}
            self._model.load_state_dict(state, strict=False)

    def module(self, path: str) -> nn.Module:
        """What PEFT has at a path of the base."""
        found: nn.Module = self._model.base_model.model.get_submodule(path)
        return found


class SumOracle(Oracle):
    """The base, each of whose linears and embeddings adds Σ scale · (what PEFT's module gives - what its own gives)."""

    def __init__(self, base: Path, terms: Mapping[KindOracle, float]) -> None:
        super().__init__(base)
        self._terms = terms
        self.to(next(iter(terms)).device)
        for path, module in self._model.named_modules():
            if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
                module.register_forward_hook(lambda _, inputs, y, path=path: self._summed(path, inputs[0], y))

    def _summed(self, path: str, x: Tensor, y: Tensor) -> Tensor:
        deltas: list[Any] = [scale * (oracle.module(path)(x) - y) for oracle, scale in self._terms.items()]
        return y + torch.stack(deltas).sum(0)
