"""An adapter in memory as it is served: what it adds to the outputs of the base's modules, and what it replaces."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor, nn


class LinearWeights(Protocol):
    """What an adapter makes of one linear's output: y = (y + x @ lora_A.T @ lora_B.T) * column_scale + shift.

    Either factor may be bfloat16 beside float32 rows; the rank may be 0. DoRA has a column scale, and trained biases
    are a shift. How the factors lie in memory is up to whoever placed them: see `Placement`.
    """

    @property
    def lora_A(self) -> Tensor:
        """[rank, in_features]."""

    @property
    def lora_B(self) -> Tensor:
        """[out_features, rank], multiplied by the scaling."""

    @property
    def column_scale(self) -> Tensor | None:
        """[out_features], float32."""

    @property
    def shift(self) -> Tensor | None:
        """[out_features], float32."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held in memory."""

    @property
    def rank(self) -> int:
        """The true rank, never padded."""

    def with_vectors(self, column_scale: Tensor | None, shift: Tensor | None) -> "LinearWeights":
        """The same factors with these, [out_features] and float32 each."""


@dataclass(frozen=True, slots=True, eq=False)
class ModuleWeights:
    """`LinearWeights` as two plain tensors."""

    lora_A: Tensor  # [rank, in_features]
    lora_B: Tensor  # [out_features, rank], multiplied by the scaling
    column_scale: Tensor | None = None  # [out_features], float32
    shift: Tensor | None = None  # [out_features], float32

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held in memory."""
        parts = (self.lora_A, self.lora_B, self.column_scale, self.shift)
        return tuple(tensor for tensor in parts if tensor is not None)

    @property
    def rank(self) -> int:
        """The true rank, never padded."""
        return self.lora_A.shape[0]

    def with_vectors(self, column_scale: Tensor | None, shift: Tensor | None) -> "ModuleWeights":
        """The same factors with these, [out_features] and float32 each."""
        return replace(self, column_scale=column_scale, shift=shift)


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingWeights:
    """What an adapter makes of looked-up rows: y = y + lora_A[ids] @ lora_B.T, and its own rows for its own tokens."""

    lora_A: Tensor  # [num_embeddings, rank], so that rows are looked up; rank 0 without low-rank factors
    lora_B: Tensor  # [embedding_dim, rank], multiplied by the scaling
    token_ids: Tensor | None = None  # [num_tokens], int64, ascending: tokens with rows of their own
    token_rows: Tensor | None = None  # [num_tokens, embedding_dim]: these rows, before what the factors add

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held in memory."""
        parts = (self.lora_A, self.lora_B, self.token_ids, self.token_rows)
        return tuple(tensor for tensor in parts if tensor is not None)

    @property
    def rank(self) -> int:
        """The true rank, never padded."""
        return self.lora_A.shape[1]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class AdapterWeights:
    """A whole adapter in memory, by the module paths of the base. No module is in two of the mappings."""

    digest: str
    modules: Mapping[str, LinearWeights]
    embeddings: Mapping[str, EmbeddingWeights] = field(default_factory=dict)
    replaced: Mapping[str, nn.Module] = field(default_factory=dict)  # the adapter's own, in place of the base's
    invocation: tuple[int, ...] = ()  # tokens of a prompt from which on the adapter applies; none: everywhere
    head: nn.Module | None = None  # of its own task, behind the base
    labels: tuple[str, ...] = ()  # of that
    tables: object = None  # what the kernels of whoever serves it read of it; see `Registry`

    @property
    def is_sum(self) -> bool:
        """Whether it only adds, and may be scaled and added to others: no DoRA, nothing replaced, no head."""
        is_scaled = any(module.column_scale is not None for module in self.modules.values())
        has_rows = any(embedding.token_ids is not None for embedding in self.embeddings.values())
        return not (is_scaled or has_rows or self.replaced or self.invocation or self.head)

    @property
    def tensors(self) -> Iterator[Tensor]:
        """Of what it adds: all but those of modules in place of the base's."""
        for linear in self.modules.values():
            yield from linear.tensors
        for embedding in self.embeddings.values():
            yield from embedding.tensors

    @property
    def all_tensors(self) -> Iterator[Tensor]:
        """Of all that is held in memory."""
        yield from self.tensors
        for module in (*self.replaced.values(), *([] if self.head is None else [self.head])):
            yield from (*module.parameters(), *module.buffers())

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held in memory."""
        return sum(tensor.nbytes for tensor in self.all_tensors)

    @property
    def num_parameters(self) -> int:
        """Elements of all that is held in memory."""
        return sum(tensor.numel() for tensor in self.all_tensors)

    @property
    def rank(self) -> int:
        """The largest rank of any module; 0 without factors."""
        linears = [module.rank for module in self.modules.values()]
        return max([*linears, *(embedding.rank for embedding in self.embeddings.values())], default=0)

    @property
    def targets(self) -> tuple[str, ...]:
        """The distinct last names of the modules, sorted."""
        return last_names([*self.modules, *self.embeddings, *self.replaced])


def last_names(paths: Iterable[str]) -> tuple[str, ...]:
    """The distinct last components of module paths, sorted."""
    return tuple(sorted({path.rpartition(".")[2] for path in paths}))
