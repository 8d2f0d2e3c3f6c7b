"""Elementwise functions made batch-invariant: the bits of a result do not depend on where in a tensor it lies.

Torch computes most of a tensor in vectors, and what is left over at the end of a thread's part number by number, with
other code for exp, tanh, sin and what is made of them. Which numbers are left over depends on how many rows there are.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

_UNIT = 64  # numbers; a multiple of what torch computes at a time, on any processor
_WHOLE = 16384  # numbers that no function of torch shares out among threads
_SHARED = 32768  # numbers for each thread, from which on every function of torch shares them out evenly among all
_NAMES = ("cos", "exp", "expm1", "erf", "log1p", "sigmoid", "sin", "tanh")
_FUNCTIONS: frozenset[Callable[..., Tensor]] = frozenset(
    [getattr(owner, name) for owner in (torch, Tensor) for name in _NAMES]
    + [getattr(nn.functional, name) for name in ("elu", "gelu", "mish", "sigmoid", "silu", "softplus", "tanh")]
)


def make_batch_invariant(model: nn.Module, head: nn.Module | None) -> None:
    """Have the modules of `model` that hold no weights, and what it does to the output of its head, compute so.

    Models keep their activations and rotary angles in such modules. A mode over all of a forward would do as well, but
    costs every operation some microseconds.
    """
    for module in model.modules():
        if _may_compute_numbers(module):
            module.forward = partial(_within, module.forward)
    if head is not None:
        _AfterHead(model, head)


def _may_compute_numbers(module: nn.Module) -> bool:
    has_parts = any(True for _ in (*module.parameters(), *module.children()))
    return (
        not has_parts and not isinstance(module, nn.Dropout | nn.Identity) and "swaplora" not in type(module).__module__
    )


def _within(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    with BatchInvariantMode():
        return forward(*inputs, **options)


class _AfterHead:
    """Enters the mode when the head of a running model is done, and leaves it with the model. For one thread."""

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        self._stack: ExitStack | None = None
        model.register_forward_pre_hook(self._begin)
        head.register_forward_hook(self._enter)
        model.register_forward_hook(self._end, always_call=True)

    def _begin(self, *_: object) -> None:
        self._stack = ExitStack()

    def _enter(self, *_: object) -> None:
        if self._stack is not None:
            self._stack.enter_context(BatchInvariantMode())

    def _end(self, *_: object) -> None:
        if self._stack is not None:
            self._stack.close()
        self._stack = None


class BatchInvariantMode(TorchFunctionMode):
    """While it is entered, the functions that models make activations, angles and caps of are computed in vectors."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        _types: Sequence[type],
        inputs: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        options = options or {}
        if function in _FUNCTIONS and inputs and not options.get("inplace"):
            return in_whole_vectors(lambda x: function(x, *inputs[1:], **options), inputs[0])
        return function(*inputs, **options)


def in_whole_vectors(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of every number of `x`, of any shape."""
    numbers = x.reshape(-1)
    count = numbers.numel()
    num_threads = torch.get_num_threads()
    shared = count - count % (_UNIT * num_threads)  # of these each thread has as many, and nothing left over
    if shared < _SHARED * num_threads:
        shared = 0
    if count == shared or (count <= _WHOLE and count % _UNIT == 0):
        return function(numbers).view(x.shape)
    y = torch.empty_like(numbers)
    if shared:
        y[:shared] = function(numbers[:shared])
    for start in range(shared, count, _WHOLE):
        piece = numbers[start : start + _WHOLE]
        y[start : start + _WHOLE] = function(pad(piece, (0, -piece.numel() % _UNIT)))[: piece.numel()]
    return y.view(x.shape)
