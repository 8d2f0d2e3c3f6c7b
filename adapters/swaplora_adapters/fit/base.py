"""The layers of a base that adapters may change: their shapes, their weights, and how to make another like one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor, nn


class LinearShape(NamedTuple):
    """A linear layer of the base that LoRA may target, whichever way round it stores its weight."""

    in_features: int
    out_features: int


class EmbeddingShape(NamedTuple):
    """An input embedding of the base."""

    num_embeddings: int
    embedding_dim: int


@dataclass(frozen=True, slots=True)
class LegacyNames:
    """What transformers 4 called the modules of a base that it has renamed or put together since."""

    renamings: Sequence[tuple[str, str]]  # a part of a path then, and now
    parameters: Mapping[str, str]  # the last name of a linear then → that of the parameter that it is in now

    def renamed(self, path: str) -> str:
        """A path of then as it is now."""
        for then, now in self.renamings:
            path = path.replace(then, now, 1)
        return path

    def linears_in(self, parameter: str) -> tuple[str, ...]:
        """The last names of the linears of then that a parameter is of, in its order of outputs."""
        return tuple(then for then, now in self.parameters.items() if now == parameter)


@dataclass(frozen=True, slots=True)
class HeadShapes:
    """The parameters of the head of one task, by their full names. In a shape None is the number of labels."""

    shapes: Mapping[str, tuple[int | None, ...]]
    given: frozenset[str] = frozenset()  # those that the base has itself; an adapter brings the others
    lacks: frozenset[str] = frozenset()  # linears of the base that models of this task are made without

    @property
    def linears(self) -> Mapping[str, LinearShape]:
        """Those whose sizes do not depend on the labels."""
        weights = {name.removesuffix(".weight"): shape for name, shape in self.shapes.items() if len(shape) == 2}
        return {path: LinearShape(shape[1], shape[0]) for path, shape in weights.items() if shape[0] and shape[1]}


# (path, parameters by name) → a module that computes as the base's at `path` does, with these parameters instead; those
# that are not given are the base's own, and a linear's weight is [out_features, in_features]
Rebuild = Callable[[str, Mapping[str, Tensor]], nn.Module]


class BaseLayers(Protocol):
    """What an adapter's file is checked against and built from, by the modules' paths."""

    @property
    def linears(self) -> Mapping[str, LinearShape]:
        """What factors may be for, the output head among them."""

    @property
    def embeddings(self) -> Mapping[str, EmbeddingShape]:
        """The input embeddings."""

    @property
    def others(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """Modules that work row by row, such as norms and experts: their parameters' shapes, in the model's order."""

    @property
    def of_distances(self) -> frozenset[str]:
        """The linears that also make keys or queries of how far apart two tokens are, or do nothing else."""

    @property
    def tied(self) -> Mapping[str, str]:
        """Each output head that shares its weight with an embedding → that embedding."""

    @property
    def transposed(self) -> frozenset[str]:
        """The linears and others whose weights in the model are [in_features, out_features], such as Conv1D.

        Of experts: [num_experts, in_features, out_features].
        """

    @property
    def root(self) -> str:
        """The path of the module that all but the heads lie in, and that may be trained by itself: such as `model`."""

    @property
    def heads(self) -> Mapping[str, HeadShapes]:
        """The heads that adapters may bring, by PEFT's task type, which is the path of a head as well."""

    @property
    def legacy_names(self) -> LegacyNames | None:
        """None where nothing has another name than it had."""

    def read(self, name: str) -> Tensor:
        """A parameter by its full name, as a float32 copy on the CPU; a linear's weight is [out_features, in_features].

        Raises KeyError where the base has none.
        """

    def rebuild(self, path: str, parameters: Mapping[str, Tensor]) -> nn.Module:
        """See `Rebuild`."""

    def rebuilder(self) -> Rebuild:
        """A `rebuild` for many modules of one adapter, which live and die together."""


@dataclass(frozen=True, slots=True)
class LayerShapes:
    """A base of which the shapes alone are known: enough for every file that needs no weight of the base."""

    linears: Mapping[str, LinearShape]
    embeddings: Mapping[str, EmbeddingShape] = field(default_factory=dict)
    others: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    legacy_names: LegacyNames | None = None
    root: str = ""
    heads: Mapping[str, HeadShapes] = field(default_factory=dict)
    of_distances: frozenset[str] = frozenset()

    def read(self, name: str) -> Tensor:
        """Raises TypeError, as all that needs weights does."""
        raise TypeError("only the shapes of this base are known")

    def rebuild(self, path: str, parameters: Mapping[str, Tensor]) -> nn.Module:
        raise TypeError("only the shapes of this base are known")

    def rebuilder(self) -> Rebuild:
        raise TypeError("only the shapes of this base are known")
