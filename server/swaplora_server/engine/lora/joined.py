"""Linears that share their input, multiplied at once: queries, keys and values; the gate and the rest of an MLP.

Which do is seen and not known by name: a forward of the model as transformers made it shows which are called with one
and the same tensor. Their weights are laid one below the other, and become views of that. The first that is called
multiplies for all of them and adds what adapters add to any; the others return their part of it.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swaplora_server.engine.lora.modules import LoraLinear, Wrapped
from swaplora_server.engine.lora.routing import replaced_rows
from swaplora_server.engine.step import running


def sharing_inputs(model: PreTrainedModel, forward: Callable[[], object]) -> list[list[str]]:
    """Paths of plain linears, together where `forward` calls each of them once and all with the same tensor."""
    calls: list[tuple[str, Tensor]] = []  # which keep the tensors, so that none has the address of another

    def noting(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, inputs: calls.append((path, inputs[0]))

    linears = _plain_linears(model)
    handles = [linear.register_forward_pre_hook(noting(path)) for path, linear in linears.items()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    times = Counter(path for path, _ in calls)
    groups: dict[object, list[str]] = {}
    for path, x in calls:
        if times[path] == 1:
            groups.setdefault((id(x), *_kind(linears[path])), []).append(path)
    return [paths for paths in groups.values() if len(paths) > 1]


def _plain_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Not quantised ones, which are of other classes, nor the head, nor such whose weights are another's too."""
    owners = Counter(id(own) for module in model.modules() for own in module.parameters(recurse=False))
    linears = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    head = model.get_output_embeddings()
    return {path: one for path, one in linears.items() if one is not head and owners[id(one.weight)] == 1}


def _kind(linear: nn.Linear) -> tuple[object, ...]:
    return linear.weight.dtype, linear.weight.device, linear.bias is None


def join(groups: Sequence[Sequence[str]], wrapped: Mapping[str, Wrapped]) -> Callable[[], None] | None:
    """Have each group multiply at once; what undoes it, or None where there is no group."""
    joined = [Joined([_linear(wrapped[path]) for path in paths]) for paths in groups]

    def undo() -> None:
        for group in joined:
            group.part()

    return undo if joined else None


def _linear(module: Wrapped) -> LoraLinear:
    assert isinstance(module, LoraLinear)
    return module


class Joined:
    """Linears of one input. Their weights, and their outputs in a step, are parts of one tensor."""

    def __init__(self, linears: Sequence[LoraLinear]) -> None:
        self._linears = linears
        self._widths = [linear.base.get_parameter("weight").shape[0] for linear in linears]
        self._bias = None if linears[0].base.bias is None else self._one("bias")
        self._weight = self._one("weight")
        self._x: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}  # of `_x`, by number, until they are called for
        for linear in linears:
            linear.joined = self.output

    def part(self) -> None:
        """Let each multiply by itself again; the weights stay where they are."""
        for linear in self._linears:
            linear.joined = None

    def output(self, linear: LoraLinear, x: Tensor) -> Tensor:
        """Of one of them. x: [..., num_rows, in_features] → [..., num_rows, out_features]."""
        if x is not self._x or linear.number not in self._outputs:
            self._x, self._outputs = x, self._computed(x)
        y = self._outputs.pop(linear.number)
        if not self._outputs:
            self._x = None
        return y

    def _computed(self, x: Tensor) -> dict[int, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        parts = torch.split(nn.functional.linear(rows, self._weight, self._bias), self._widths, 1)
        step = running().tokens
        for linear, y in zip(self._linears, parts, strict=True):
            for start, stop, module in replaced_rows(step.segments, linear.path):
                y[start:stop] = module(rows[start:stop])
        if step.lora is not None:
            step.lora.add(rows, [(y, linear.number) for linear, y in zip(self._linears, parts, strict=True)])
        return {linear.number: y.view(*x.shape[:-1], -1) for linear, y in zip(self._linears, parts, strict=True)}

    def _one(self, name: str) -> Tensor:
        """All of their weights or biases, of which each has a view from now on."""
        joined = torch.cat([linear.base.get_parameter(name).detach() for linear in self._linears])
        for linear, view in zip(self._linears, torch.split(joined, self._widths), strict=True):
            setattr(linear.base, name, nn.Parameter(view, requires_grad=False))
        if joined.is_cuda:
            torch.cuda.empty_cache()  # of what they were in, which is too small for the next
        return joined
