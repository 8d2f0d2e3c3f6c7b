"""Intruder dimensions: directions that an adapter makes large and that the base did not have (arXiv:2410.21228)."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from swaplora_adapters.derive.base_files import BaseFiles
from swaplora_adapters.fit.base import LinearShape
from swaplora_adapters.weights.served import AdapterWeights, LinearWeights

NUM_LOOKED_AT = 10  # of the singular vectors of the adapted weight, the largest
LEAST_COSINE = 0.6


def count_intruders(weights: AdapterWeights, base: str | Path) -> dict[str, int | None]:
    """By module: how many of the largest `NUM_LOOKED_AT` are intruders; None where the base's weight is not found.

    Builds the base's skeleton to see which linears are Conv1D, and while it does torch's default dtype may be another:
    for a process of its own.
    """
    files, transposed = BaseFiles(base), _transposed_paths(base)
    found = {}
    for path, module in weights.modules.items():
        shape = LinearShape(module.lora_A.shape[1], module.lora_B.shape[0])
        weight = files.weight(path, shape)
        if weight is not None:
            weight = weight.T if path in transposed else weight
        found[path] = None if weight is None else intruders(weight.float(), module)
    return found


def intruders(weight: Tensor, module: LinearWeights) -> int:
    """How many of the largest left singular vectors of weight [out, in] + B A are unlike each of the weight's own."""
    own = torch.linalg.svd(weight, full_matrices=False).U
    adapted = torch.linalg.svd(weight + module.lora_B @ module.lora_A, full_matrices=False).U[:, :NUM_LOOKED_AT]
    likeness = (own.T @ adapted).abs().amax(0)
    return int((likeness < LEAST_COSINE).sum())


def _transposed_paths(base: str | Path) -> frozenset[str]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    return frozenset(path for path, module in model.named_modules() if isinstance(module, Conv1D))
