"""The input embedding of a float32 model, kept as bfloat16 where that loses nothing: half the bytes, the same rows."""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding


class NarrowEmbedding(nn.Module):
    """Looks rows up in bfloat16 and widens what it found."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        """weight: [num_embeddings, embedding_dim], float32, all of its values exact in bfloat16."""
        super().__init__()
        self.register_buffer("weight", weight.detach().bfloat16(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [..., num_rows] → float32 [..., num_rows, embedding_dim]."""
        return embedding(ids, self.weight).float()


def narrow(module: nn.Module) -> nn.Module:
    """A stand-in for a plain float32 embedding, or `module` itself when something would be lost."""
    if type(module) is not nn.Embedding or module.weight.dtype != torch.float32:
        return module
    is_exact = torch.equal(module.weight.bfloat16().float(), module.weight)
    return NarrowEmbedding(module.weight) if is_exact else module
