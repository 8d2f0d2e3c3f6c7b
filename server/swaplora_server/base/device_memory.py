"""A GPU's memory, taken at start. A CPU's is not counted: it is taken as it is written to, not when it is asked for."""

from collections.abc import Callable

import structlog
import torch

from swaplora_server.base.proof import UnsupportedModelError

_log = structlog.get_logger(__name__)


def free_bytes(device: torch.device) -> int | None:
    """What can still be taken on `device`, what torch keeps for later given back first; None for a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    free: int = torch.cuda.mem_get_info(device)[0]
    return free


def take_kv_cache(run_step: Callable[[], None], device: torch.device, kv_bytes: int, adapter_bytes: int) -> None:
    """Have the KV cache, and what a step needs beside it, take their memory now, and not with the first requests.

    Warns of adapters that will not fit beside it. Raises UnsupportedModelError when these do not fit.
    """
    free = free_bytes(device)
    if free is None:
        return
    refusal = f"--kv-cache-bytes asks for {kv_bytes} bytes, and beside the base the GPU has {free} free: lower it"
    if kv_bytes > free:
        raise UnsupportedModelError(refusal)
    try:
        run_step()
    except torch.OutOfMemoryError as error:
        raise UnsupportedModelError(refusal) from error
    if kv_bytes + adapter_bytes > free:
        _log.warning(
            "the GPU does not hold the KV cache and all adapters that may be resident: lower --adapter-memory-bytes",
            free_bytes=free,
            kv_cache_bytes=kv_bytes,
            adapter_memory_bytes=adapter_bytes,
        )
