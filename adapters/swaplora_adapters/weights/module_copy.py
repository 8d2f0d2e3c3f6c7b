"""A module with other tensors: what is the base's, or still lies in another tier, is left as it is."""

import copy
from collections.abc import Callable

from torch import Tensor, nn


def with_tensors(module: nn.Module, made: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of `module` that has `made` of each of its parameters and buffers, in whatever it consists of.

    `nn.Module.to` would change the modules and parameters themselves, which a shallow copy of a module shares with it.
    """
    copied = copy.copy(module)
    copied._parameters = {  # noqa: SLF001 - as in the other two: a shallow copy shares the dictionary
        name: None if parameter is None else _parameter(made(parameter))
        for name, parameter in module._parameters.items()  # noqa: SLF001
    }
    copied._buffers = {  # noqa: SLF001
        name: None if buffer is None else made(buffer)
        for name, buffer in module._buffers.items()  # noqa: SLF001
    }
    copied._modules = {  # noqa: SLF001
        name: None if child is None else with_tensors(child, made)
        for name, child in module._modules.items()  # noqa: SLF001
    }
    return copied


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
