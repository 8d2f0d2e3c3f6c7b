"""The input embedding of a float32 model in less memory, with the same rows: a tied head's, or bfloat16."""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from swaplora_server.kernels.cpu.linear import CpuLinear


class TiedEmbedding(nn.Module):
    """Looks rows up in the packed output head that it is tied to."""

    def __init__(self, head: CpuLinear) -> None:
        super().__init__()
        self._head = [head]  # in a list: not a part of this module, which would count its bytes twice
        self.num_embeddings, self.embedding_dim = head.out_features, head.in_features

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [..., num_rows] → float32 [..., num_rows, embedding_dim]."""
        head = self._head[0]
        return head.rows(ids.reshape(-1)).view(*ids.shape, head.in_features)

    def dense(self) -> Tensor:
        """[num_embeddings, embedding_dim], float32."""
        return self._head[0].dense()


class Bf16Embedding(nn.Module):
    """Looks rows up in bfloat16 and widens what it found."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        """weight: [num_embeddings, embedding_dim], float32, all of its values exact in bfloat16."""
        super().__init__()
        self.register_buffer("weight", weight.detach().bfloat16(), persistent=False)
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [..., num_rows] → float32 [..., num_rows, embedding_dim]."""
        return embedding(ids, self.weight).float()

    def dense(self) -> Tensor:
        """[num_embeddings, embedding_dim], float32."""
        return self.weight.float()


def compact_embedding(module: nn.Module, tied_head: nn.Module | None) -> nn.Module:
    """A stand-in for a plain float32 embedding, or `module` itself when something would be lost."""
    if type(module) is not nn.Embedding or module.weight.dtype != torch.float32:
        return module
    if isinstance(tied_head, CpuLinear):
        return TiedEmbedding(tied_head)
    is_exact = torch.equal(module.weight.bfloat16().float(), module.weight)
    return Bf16Embedding(module.weight) if is_exact else module
