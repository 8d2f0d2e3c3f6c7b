"""The shape of a linear module. Apart from `base`, which is imported where transformers would cost a second."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from swaplora_adapters.fit.base import LinearShape


def shape_of(linear: nn.Module) -> LinearShape:
    """What the factors of an adapter must match: in and out features of a linear, or of GPT-2's transposed Conv1D."""
    if isinstance(linear, Conv1D):
        return LinearShape(in_features=linear.nx, out_features=linear.nf)
    in_features, out_features = linear.in_features, linear.out_features
    if not (isinstance(in_features, int) and isinstance(out_features, int)):
        raise TypeError(f"{type(linear).__name__} does not say how many features it has")
    return LinearShape(in_features, out_features)
