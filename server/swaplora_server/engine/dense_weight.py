"""The weight of a linear in float32, however the model keeps it."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from swaplora_server.engine.quantised_codes import codes_of, is_quantised
from swaplora_server.engine.quantised_linear import QuantisedLinear


def weight_of(linear: nn.Module) -> Tensor:
    """[out_features, in_features], as the base multiplies with it. Raises TypeError for a linear of another kind."""
    if isinstance(linear, QuantisedLinear):
        return linear.dense()
    if is_quantised(linear):
        return codes_of(linear).dense()
    if isinstance(linear, Conv1D | nn.Linear):
        weight: Tensor = linear.weight.detach().float()
        return weight.t() if isinstance(linear, Conv1D) else weight
    raise TypeError(f"the weight of a {type(linear).__name__} cannot be read")
