"""An adapter merged into weights of its own: what it adds is added once, and its rows cost what the base's do."""

from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from swaplora_adapters.fit.base import BaseLayers
from swaplora_adapters.weights.served import AdapterWeights, EmbeddingWeights, LinearWeights


def materialise(weights: AdapterWeights, base: BaseLayers) -> AdapterWeights:
    """The same adapter with whole modules in place of what it adds, computed in float32.

    The base's own weights are read, never written. A weight that the base stores in bfloat16 stays bfloat16, rounded
    once; the prompt's invocation, if it has one, stays too.
    """
    replaced = {**weights.replaced, **dict(_folded(weights, base))}
    return replace(
        weights, modules=MappingProxyType({}), embeddings=MappingProxyType({}), replaced=MappingProxyType(replaced)
    )


def _folded(weights: AdapterWeights, base: BaseLayers) -> Iterator[tuple[str, nn.Module]]:
    """One module after the other, so that one is in memory in float32 at a time."""
    rebuild = base.rebuilder()
    for path, module in weights.modules.items():
        yield path, rebuild(path, _linear(path, module, base))
    for path, embedding in weights.embeddings.items():
        stored = base.read(f"{path}.weight")
        yield path, rebuild(path, {"weight": _as_stored(_table(stored, embedding), stored)})


def _linear(path: str, module: LinearWeights, base: BaseLayers) -> dict[str, Tensor]:
    """W' = (W + B A) · column_scale by rows, b' = b · column_scale + shift, where the factors lie."""
    device = module.lora_B.device
    stored, bias = base.read(f"{path}.weight"), _bias(path, base, device)
    weight = torch.addmm(stored.to(device), module.lora_B.float(), module.lora_A.float())
    if module.column_scale is not None:
        weight *= module.column_scale[:, None]
        bias = None if bias is None else bias * module.column_scale
    if module.shift is not None:
        bias = module.shift if bias is None else bias + module.shift
    parameters = {"weight": _as_stored(weight, stored)}
    return parameters if bias is None else {**parameters, "bias": bias}


def _bias(path: str, base: BaseLayers, device: torch.device) -> Tensor | None:
    try:
        return base.read(f"{path}.bias").to(device)
    except KeyError:
        return None


def _table(stored: Tensor, embedding: EmbeddingWeights) -> Tensor:
    table = stored.to(embedding.lora_A.device, copy=True)
    if embedding.token_ids is not None and embedding.token_rows is not None:
        table[embedding.token_ids] = embedding.token_rows.float()
    return table.addmm_(embedding.lora_A.float(), embedding.lora_B.float().t())


def _as_stored(weight: Tensor, stored: Tensor) -> Tensor:
    return weight.bfloat16().float() if torch.equal(stored.bfloat16().float(), stored) else weight
