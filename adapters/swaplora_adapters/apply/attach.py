"""Putting the wrapped layers into a model, once, before it serves."""

from collections.abc import Callable

from torch import nn
from transformers.pytorch_utils import Conv1D

from swaplora_adapters.apply.activation import Activation
from swaplora_adapters.apply.layers import LoraLinear
from swaplora_adapters.artifact.base_layers import LinearShape


def attach(
    model: nn.Module,
    activation: Activation,
    *,
    head: nn.Module | None,
    prepare: Callable[[nn.Module], nn.Module] = lambda linear: linear,
) -> dict[str, LoraLinear]:
    """Replace every linear of `model` by a wrapped one and return them by path.

    `head` is the output projection, which sees only the rows that sample. `prepare` may exchange a base linear for one
    that computes the same faster; it is called once per linear, one after the other, so that memory is not held twice.
    """
    targets = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    wrapped: dict[str, LoraLinear] = {}
    while targets:
        path, module = targets.pop()
        linear = LoraLinear(path, prepare(module), activation, is_head=module is head)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, linear)
        wrapped[path] = linear
    return dict(reversed(wrapped.items()))


def shape_of(linear: nn.Module) -> LinearShape:
    """What the factors of an adapter must match: in and out features of a linear, or of GPT-2's transposed Conv1D."""
    if isinstance(linear, Conv1D):
        return LinearShape(in_features=linear.nx, out_features=linear.nf)
    in_features, out_features = linear.in_features, linear.out_features
    if not (isinstance(in_features, int) and isinstance(out_features, int)):
        raise TypeError(f"{type(linear).__name__} does not say how many features it has")
    return LinearShape(in_features, out_features)
