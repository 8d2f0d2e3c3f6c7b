"""The `BaseLayers` of a plain transformers model, as a server makes one of the base that it has loaded."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from swaplora_adapters.fit.base import BaseLayers, EmbeddingShape, LayerShapes, Rebuild
from swaplora_adapters.fit.legacy_names import legacy_names_of
from swaplora_adapters.fit.module_shape import shape_of


def layers_of(model: PreTrainedModel) -> BaseLayers:
    """`others` are all other modules that have parameters of their own."""
    modules = dict(model.named_modules())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    linears = {path: module for path, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
    [embedding_path] = [path for path, module in modules.items() if module is embedding]
    [head_path] = [path for path, module in modules.items() if module is head]
    others = {
        path: {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
        for path, module in modules.items()
        if path not in linears and path != embedding_path
    }
    is_tied = head.weight is embedding.weight
    return _WholeBase(
        model=model,
        linears={path: shape_of(module) for path, module in linears.items()},
        embeddings={embedding_path: EmbeddingShape(*embedding.weight.shape)},
        others={path: shapes for path, shapes in others.items() if shapes},
        tied={head_path: embedding_path} if is_tied else {},
        transposed=frozenset(path for path, module in modules.items() if _is_transposed(module)),
        legacy_names=legacy_names_of(model.config.model_type),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _WholeBase(LayerShapes):
    model: PreTrainedModel

    def read(self, name: str) -> Tensor:
        return _read(self.model, name)

    def rebuild(self, path: str, parameters: Mapping[str, Tensor]) -> nn.Module:
        return _rebuild(self.model.get_submodule(path), parameters)

    def rebuilder(self) -> Rebuild:
        return self.rebuild


def _is_transposed(module: nn.Module) -> bool:
    return isinstance(module, Conv1D) or getattr(module, "is_transposed", False) is True


def _read(model: PreTrainedModel, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    parameter: Tensor | None = dict(module.named_parameters(recurse=False)).get(last)
    if parameter is None:
        raise KeyError(name)
    is_flipped = isinstance(module, Conv1D) and last == "weight"
    return (parameter.t() if is_flipped else parameter).detach().float().clone().contiguous()


@torch.no_grad()
def _rebuild(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    rebuilt = copy.deepcopy(module).requires_grad_(False)
    for name, tensor in parameters.items():
        is_flipped = isinstance(module, Conv1D) and name == "weight"
        rebuilt.get_parameter(name).copy_(tensor.t() if is_flipped else tensor)
    return rebuilt
