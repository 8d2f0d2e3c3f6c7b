"""DoRA: the magnitude of each output, or of each column of an embedding, over the norm of what it scales.

arXiv:2402.09353; `peft.tuners.lora.dora.DoraLinearLayer.get_weight_norm`. In blocks of rows, so that W + B A is never
there as a whole.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 20


def row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """[num_rows] norms of the rows of weight [num_rows, num_columns] + lora_B [num_rows, rank] @ lora_A; float32."""
    return torch.cat([torch.linalg.vector_norm(block, dim=1) for block in adapted_rows(weight, lora_A, lora_B)])


def column_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """[num_columns] norms of the columns of the same."""
    squares = torch.zeros(weight.shape[1], dtype=torch.float64)
    for block in adapted_rows(weight, lora_A, lora_B):
        squares += block.square().sum(0)
    return squares.sqrt().to(torch.float32)


def adapted_rows(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Iterator[Tensor]:
    """Blocks of the rows of weight + lora_B @ lora_A, in order, at most `BLOCK_ELEMENTS` numbers each; all float32.

    weight: [out_features, in_features]; lora_A: [rank, in_features]; lora_B: [out_features, rank].
    """
    num_rows = max(1, BLOCK_ELEMENTS // weight.shape[1])
    for rows, factor in zip(torch.split(weight, num_rows), torch.split(lora_B, num_rows), strict=True):
        yield torch.addmm(rows, factor, lora_A)
