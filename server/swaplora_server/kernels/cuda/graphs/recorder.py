"""What records launches: CUDA, or in tests what stands in for it."""

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch


class Recorder(Protocol):
    """Records one graph after the other; what they need in between is shared, as no two of them run at once."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """The launches of `run`, which is called several times; returns what launches them again.

        Raises RuntimeError for what cannot be recorded, such as a wait for the device.
        """


class CudaRecorder:
    """Graphs of one memory pool, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []  # kept: torch's allocator of pinned memory still asks them

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder`. Other threads may use the device meanwhile, as those that load adapters do."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # which is left behind where recording fails
            run()  # compiles, loads and sets up what cannot be while recording
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    run()
            except RuntimeError:
                self._failed.append(graph)
                self._end_pool()
                self._end_drawing()
                raise
        return graph.replay

    def _end_pool(self) -> None:
        """Have the allocator know that nothing is recorded.

        Where a capture fails, torch before 2.13 leaves it in the belief, and the next `empty_cache` fails an assertion.
        """
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)  # noqa: SLF001

    def _end_drawing(self) -> None:
        """Have the device's own generator know the same, in torch before 2.13: or it never draws a number again."""
        with suppress(RuntimeError):
            own = torch.cuda.default_generators[self._device.index or 0]
            fresh = torch.Generator(self._device).manual_seed(own.initial_seed())
            own.graphsafe_set_state(fresh.graphsafe_get_state())
