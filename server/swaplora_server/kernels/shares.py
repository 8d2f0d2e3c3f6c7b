"""Room for what traced rows take of the members of their mixtures."""

import numpy as np

from swaplora_adapters.weights.router import Shares, Trace
from swaplora_server.kernels.step import Segment, Segments


class TracedShares:
    """Of each traced mixture of a step, which has one request's rows: filled by kernels, module by module."""

    def __init__(self, segments: Segments) -> None:
        self._found: dict[str, Shares] = {}
        for segment in segments:
            route = segment.route
            if route is not None and route.member == 0 and route.router.trace is not None:
                members = route.router.members
                shape = (len(members[0].vectors), segment.stop - segment.start, len(members))
                self._found[route.router.trace.key] = np.full(shape, np.nan, np.float32)

    def find(self, trace: Trace) -> Shares | None:
        """Those of the rows that it watches."""
        return self._found.get(trace.key)

    def of(self, segment: Segment) -> Shares | None:
        """Those of its rows, if they are traced."""
        trace = None if segment.route is None else segment.route.router.trace
        return None if trace is None else self.find(trace)
