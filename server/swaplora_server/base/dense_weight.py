"""The weight of a module in plain form, however the model keeps it."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from swaplora_server.base.lean_embedding import NarrowEmbedding, TiedEmbedding
from swaplora_server.kernels.cpu.linear import CpuLinear
from swaplora_server.kernels.cpu.quantised_linear import QuantisedLinear
from swaplora_server.kernels.quantised_codes import codes_of, is_quantised
from swaplora_server.kernels.torch.onednn_linear import OnednnLinear


def weight_of(module: nn.Module) -> Tensor:
    """The weight that a linear, embedding or norm computes with; a linear's is [out_features, in_features]."""
    if isinstance(module, CpuLinear | OnednnLinear | QuantisedLinear | NarrowEmbedding | TiedEmbedding):
        return module.dense()
    if is_quantised(module):
        return codes_of(module).dense()
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"a {type(module).__name__} has no weight that can be read")
    return weight.detach().t() if isinstance(module, Conv1D) else weight.detach()
