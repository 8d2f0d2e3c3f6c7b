"""A matrix as two factors, cut down to its largest singular directions; from whatever form it is known in.

The full matrix, as large as a weight of the base, is made by nobody who has factors of it already.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# How many of these singular values, largest first, are to be kept: at least one.
Limit = Callable[[Tensor], int]


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """lora_B @ lora_A, and how far that is from what was asked for, as squared Frobenius norms."""

    lora_A: Tensor  # [rank, in_features]
    lora_B: Tensor  # [out_features, rank]
    lost: float
    total: float

    @property
    def rank(self) -> int:
        """Rows of lora_A."""
        return self.lora_A.shape[0]

    @property
    def error(self) -> float:
        """Relative, in the Frobenius norm."""
        return relative_error([self])


def relative_error(parts: Iterable[LowRank]) -> float:
    """Of all parts taken together as one matrix; 0 where there is nothing."""
    sums = [(part.lost, part.total) for part in parts]
    lost, total = sum(lost for lost, _ in sums), sum(total for _, total in sums)
    return float((lost / total) ** 0.5) if total else 0.0


def at_most(rank: int) -> Limit:
    """The `rank` largest."""
    return lambda values: min(rank, len(values))


def cut_factors(lora_A: Tensor, lora_B: Tensor, limit: Limit) -> LowRank:
    """lora_B [out, r] @ lora_A [r, in]: the QR of each factor leaves a core no larger than [r, r] to decompose."""
    right, right_core = torch.linalg.qr(lora_A.double().T)
    left, left_core = torch.linalg.qr(lora_B.double())
    u, values, v = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    rank = limit(values)
    return _kept((v[:rank] @ right.T), (left @ u[:, :rank]) * values[:rank], values, rank)


def cut_matrix(matrix: Tensor, limit: Limit) -> LowRank:
    """A full matrix [out, in]."""
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    rank = limit(values)
    return _kept(v[:rank], u[:, :rank] * values[:rank], values, rank)


def cut_kronecker(first: Tensor, second: Tensor, limit: Limit) -> LowRank:
    """first [a, b] ⊗ second [c, d]: its singular values are the products of theirs, its vectors likewise."""
    (u1, values1, v1), (u2, values2, v2) = (torch.linalg.svd(x.double(), full_matrices=False) for x in (first, second))
    values, order = torch.outer(values1, values2).flatten().sort(descending=True, stable=True)
    rank = limit(values)
    i, j = order[:rank] // len(values2), order[:rank] % len(values2)
    lora_A = torch.einsum("kb,kd->kbd", v1[i], v2[j]).reshape(rank, -1)
    lora_B = torch.einsum("ak,ck->ack", u1[:, i], u2[:, j]).reshape(-1, rank) * values[:rank]
    return _kept(lora_A, lora_B, values, rank)


def _kept(lora_A: Tensor, lora_B: Tensor, values: Tensor, rank: int) -> LowRank:
    energy = values.double().square()
    return LowRank(_own(lora_A), _own(lora_B), float(energy[rank:].sum()), float(energy.sum()))


def _own(factor: Tensor) -> Tensor:
    """In float32 and row by row, and no part of a larger tensor, which would stay in memory with it."""
    return factor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
