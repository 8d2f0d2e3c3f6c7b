"""A GPU's memory, taken at start. Of a CPU's the KV cache's alone is taken then, and it alone is counted."""

from collections.abc import Callable

import structlog
import torch

from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.host_memory import room_bytes

_log = structlog.get_logger(__name__)
_GRAPH_BYTES = 16 << 20  # that the driver keeps of one, at most


def free_bytes(device: torch.device) -> int | None:
    """What can still be taken on `device`, what torch keeps for later given back first; None for a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    free: int = torch.cuda.mem_get_info(device)[0]
    return free


def left_for_kv(
    run_step: Callable[[], None], device: torch.device, fraction: float, adapter_bytes: int, graph_bytes: int
) -> int:
    """What a KV cache may take of a GPU that is to be filled up to `fraction`, in bytes.

    That is less the base, `adapter_bytes`, `graph_bytes` of recorded steps, and what the largest step takes for itself,
    which `run_step` shows. Raises UnsupportedModelError when nothing is left.
    """
    try:
        step_bytes = peak_bytes(run_step, device)
    except torch.OutOfMemoryError as error:
        raise UnsupportedModelError(
            "the GPU does not hold the base and what a step of --max-batch-tokens tokens needs: lower that"
        ) from error
    free, kept_free = free_bytes(device) or 0, round((1 - fraction) * total_bytes(device))
    left = free - kept_free - adapter_bytes - step_bytes - graph_bytes
    if left <= 0:
        raise UnsupportedModelError(
            f"the GPU has {free} bytes free beside the base; {adapter_bytes} are for adapters, {step_bytes} for a "
            f"step, {graph_bytes} for recorded steps, and {kept_free} stay free: nothing is left for the KV cache. "
            "Lower --adapter-memory-bytes, --max-batch-tokens or --max-num-seqs, or raise --gpu-memory-fraction"
        )
    return left


def graph_bytes(record_largest: Callable[[], int], device: torch.device, num_sizes: int) -> int:
    """What recorded steps of `num_sizes` numbers of rows will take, in bytes.

    `record_largest` records those of the most rows, in whose memory the others fit as well, and returns of how many
    graphs. 0 where it cannot: nothing will be recorded then.
    """
    num_graphs = 0

    def record() -> None:
        nonlocal num_graphs
        num_graphs = record_largest()

    try:
        peak = peak_bytes(record, device)
    except Exception:  # noqa: BLE001 - whatever it is, it is told when the steps are to be recorded
        return 0
    return peak + num_graphs * num_sizes * _GRAPH_BYTES if num_graphs else 0


def total_bytes(device: torch.device) -> int:
    """Of the GPU."""
    total: int = torch.cuda.mem_get_info(device)[1]
    return total


def peak_bytes(run_step: Callable[[], None], device: torch.device) -> int:
    """What `run_step` takes of the GPU at most, for itself and beside what is there."""
    torch.cuda.reset_peak_memory_stats(device)
    before: int = torch.cuda.memory_allocated(device)
    run_step()
    peak: int = torch.cuda.max_memory_allocated(device)
    return peak - before


def check_host_room(kv_bytes: int) -> None:
    """Raise UnsupportedModelError for a KV cache in the host's memory that the system would end this process for."""
    room = room_bytes()
    if room is not None and kv_bytes > room:
        raise UnsupportedModelError(
            f"the KV cache takes {kv_bytes} bytes, and the machine, or its control group, has {room} beside the base: "
            "lower --kv-cache-bytes"
        )


def take_kv_cache(
    run_step: Callable[[], None],
    run_row: Callable[[], None],
    device: torch.device,
    kv_bytes: int,
    adapter_bytes: int,
) -> None:
    """Have the KV cache, and what a step needs beside it, take their memory now, and not with the first requests.

    `run_step` runs the largest step; on a CPU `run_row` is enough, a step of one row, which makes the cache.
    Warns of adapters that will not fit beside it. Raises UnsupportedModelError when these do not fit.
    """
    free = free_bytes(device)
    if free is None:
        try:
            run_row()
        except (OSError, MemoryError) as error:
            raise UnsupportedModelError(
                f"the system does not give the {kv_bytes} bytes of the KV cache: lower --kv-cache-bytes"
            ) from error
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
