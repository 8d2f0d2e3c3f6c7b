"""What records launches: CUDA, or in tests what stands in for it."""

from collections.abc import Callable
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
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder`. Other threads may use the device meanwhile, as those that load adapters do."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()  # compiles, loads and sets up what cannot be while recording
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay
