"""How much of the host's memory keeps adapters beside a GPU's, and whether the GPU reads it by itself."""

import structlog

from swaplora_adapters.registry.residency.host_tier import HostTier
from swaplora_adapters.weights.memory import Arena, pinned
from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.host_memory import room_bytes

HOST_ADAPTER_BYTES = 4 * 2**30  # unless the settings say otherwise
_log = structlog.get_logger(__name__)


def host_budget(wanted: int | None, device_type: str) -> int:
    """Bytes of adapters, where the settings want so many; 0 on a CPU, whose memory is the host's already.

    Raises UnsupportedModelError if some are wanted there.
    """
    if device_type == "cpu":
        if wanted:
            raise UnsupportedModelError(
                "--host-adapter-bytes is for adapters beside a GPU's memory: on a CPU leave it out, and set "
                "--adapter-memory-bytes"
            )
        return 0
    return HOST_ADAPTER_BYTES if wanted is None else wanted


def open_host_tier(budget: int) -> HostTier:
    """Of so many bytes, in pinned memory where the system gives so much."""
    if not budget:
        return HostTier(0)
    room = room_bytes()
    try:
        if room is not None and budget > room:  # what is pinned is taken at once
            raise MemoryError(f"{budget} bytes are wanted, and the machine, or its control group, has {room}")
        return HostTier(budget, Arena(pinned(budget)))
    except (RuntimeError, OSError, MemoryError) as error:
        _log.warning("the host's memory for adapters is not pinned: they come back more slowly", reason=str(error))
        return HostTier(budget)
