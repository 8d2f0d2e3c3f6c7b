"""Which adapters others can be made of: those that only add a low-rank delta to some of the base's linears."""

from swaplora_adapters.config.spec import AdapterSpec
from swaplora_adapters.errors import UnsupportedAdapterError

_DELTAS = frozenset({"lora", "adalora", "qalora"})


def require_deltas(spec: AdapterSpec) -> None:
    """Raise UnsupportedAdapterError naming every other kind that the adapter is of."""
    if others := [kind for kind in spec.kinds if kind not in _DELTAS]:
        reasons = [f"an adapter of kind {kind} cannot be combined, merged or compared with the base" for kind in others]
        raise UnsupportedAdapterError(reasons)
