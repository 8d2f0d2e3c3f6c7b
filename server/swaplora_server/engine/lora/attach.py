"""Putting the wrapped modules into a model, once, before it serves."""

from collections.abc import Callable

from torch import nn
from transformers.pytorch_utils import Conv1D

from swaplora_server.engine.lora.modules import LoraEmbedding, LoraLinear, Replaceable, Wrapped


def attach(
    model: nn.Module,
    *,
    embedding: nn.Module | None,
    head: nn.Module | None,
    prepare: Callable[[nn.Module], nn.Module] = lambda linear: linear,
) -> dict[str, Wrapped]:
    """Replace every module of `model` that has weights of its own by a wrapped one, and return them by path.

    The place of one among them is its number.

    `embedding` is the input embedding; those of positions are left alone. `head` is the output projection, which sees
    only the rows that sample. `prepare` may exchange a base linear for one that computes the same faster; it is called
    once per linear, one after the other, so that memory is not held twice.
    """
    targets = [
        (path, module)
        for path, module in model.named_modules()
        if _is_leaf(module) and (not isinstance(module, nn.Embedding) or module is embedding)
    ]
    wrapped: dict[str, Wrapped] = {}
    while targets:
        path, module = targets.pop()
        number = len(targets)
        if isinstance(module, nn.Linear | Conv1D):
            is_transposed = isinstance(module, Conv1D)
            wrapped[path] = LoraLinear(
                path, number, prepare(module), is_head=module is head, is_transposed=is_transposed
            )
        elif isinstance(module, nn.Embedding):
            wrapped[path] = LoraEmbedding(path, number, module)
        else:
            wrapped[path] = Replaceable(path, number, module)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, wrapped[path])
    return dict(reversed(wrapped.items()))


def _is_leaf(module: nn.Module) -> bool:
    """Whether it has parameters, and nothing inside it does, such as the activation function of experts."""
    return _has_parameters(module, recurse=False) and not any(map(_has_parameters, module.children()))


def _has_parameters(module: nn.Module, *, recurse: bool = True) -> bool:
    return any(True for _ in module.parameters(recurse))
