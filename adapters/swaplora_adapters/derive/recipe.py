"""How an adapter is composed of others, and of which: those that only add a low-rank delta to some of the linears."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from swaplora_adapters.config.spec import AdapterSpec
from swaplora_adapters.errors import UnsupportedAdapterError

_DELTAS = frozenset({"lora", "adalora", "qalora"})
Method = Literal["sum", "svd", "ties", "dare_linear", "dare_ties"]
# What each method needs to be told, and what it may be told as well.
REQUIRED: Mapping[Method, frozenset[str]] = {
    "sum": frozenset(),
    "svd": frozenset({"rank"}),
    "ties": frozenset({"density"}),
    "dare_linear": frozenset({"density"}),
    "dare_ties": frozenset({"density"}),
}
OPTIONAL: Mapping[Method, frozenset[str]] = {
    "sum": frozenset(),
    "svd": frozenset(),
    "ties": frozenset({"rank"}),
    "dare_linear": frozenset({"rank", "seed"}),
    "dare_ties": frozenset({"rank", "seed"}),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How adapters are combined. What is None is not given, and REQUIRED and OPTIONAL say what may be."""

    method: Method
    density: float | None = None  # the share of entries that ties and dare keep, in (0, 1]
    rank: int | None = None  # the most that a module keeps; None keeps the sum of the ranks
    seed: int | None = None  # of what dare drops; None is 0

    def told(self) -> dict[str, Any]:
        """What was given, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def require_deltas(spec: AdapterSpec) -> None:
    """Raise UnsupportedAdapterError naming every other kind that the adapter is of."""
    if others := [kind for kind in spec.kinds if kind not in _DELTAS]:
        reasons = [f"an adapter of kind {kind} cannot be combined, merged or compared with the base" for kind in others]
        raise UnsupportedAdapterError(reasons)
