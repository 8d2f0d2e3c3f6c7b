"""A model of half precision that computes in float32 for a while, its weights upcast one module at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_HALVES = (torch.bfloat16, torch.float16)


@contextmanager
def upcast(model: nn.Module) -> Iterator[None]:
    """Have `model` compute in float32. Beyond its own memory that takes its largest module's, in float32."""
    handles = [handle for module in model.modules() for handle in _hooks(module)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(module: nn.Module) -> Iterator[RemovableHandle]:
    for own in (module._parameters, module._buffers):  # noqa: SLF001 - the only way to exchange them without a copy
        halves = {name: tensor for name, tensor in own.items() if tensor is not None and tensor.dtype in _HALVES}
        if halves:
            yield module.register_forward_pre_hook(partial(_upcast, own, halves))
            yield module.register_forward_hook(partial(_restore, own, halves), always_call=True)


def _upcast(own: dict[str, Any], halves: dict[str, Tensor], _module: nn.Module, _inputs: object) -> None:
    own.update({name: nn.Parameter(half.float(), requires_grad=False) for name, half in halves.items()})


def _restore(
    own: dict[str, Any], halves: dict[str, Tensor], _module: nn.Module, _inputs: object, _output: object
) -> None:
    own.update(halves)
