"""What is in a step: everything that kernels read of it, as arrays that are made once. Imports no torch.

A step packs the rows of many sequences one after the other into [1, num_rows]. Attention sees each sequence as a run of
rows over its blocks; the LoRA operation sees segments, so that "rows 4 to 7 use A at 1.0 and B at 0.4" is two over the
same rows. Base rows are in no segment and cost nothing. Segments are there twice, since a model has two row spaces:
every token, and the rows that reach the output head. `engine/step.py` makes plans, and holds the one that runs.
"""

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from swaplora_adapters.weights.router import Route
    from swaplora_adapters.weights.served import AdapterWeights

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Wants(enum.IntEnum):
    """What becomes of a row's last hidden state, settled when it is scheduled."""

    NOTHING = 0  # only its keys and values are wanted
    SAMPLE = 1
    HIDDEN = 2  # itself
    SCORE = 3  # how likely it makes the token after it, which is known


class StepForm(enum.StrEnum):
    """How a step is launched, and if one operation at a time, why."""

    GRAPH = "graph"  # as it was recorded
    PROMPT = "prompt"  # some row is of a prompt
    ADAPTER = "adapter"  # some adapter has modules of its own, changes embeddings, or is in a mixture
    ROOM = "room"  # it is larger than what was recorded
    PLAIN = "plain"  # nothing is recorded


class Runs:
    """Whose rows a step has, one sequence after the other: tokens from position `firsts[i]` on, over its own blocks."""

    def __init__(
        self,
        firsts: Sequence[int],
        lengths: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        unwritten: Sequence[int] = (),
    ) -> None:
        """Of each sequence: its first row's position, its tokens up to its last row, and its block table.

        `unwritten` are rows whose keys and values are not kept. Raises ValueError for a sequence that has more tokens
        than its blocks hold.
        """
        entries: list[int] = []
        start = block_start = 0
        for first, length, table in zip(firsts, lengths, block_tables, strict=True):
            if length > len(table) * block_size:
                raise ValueError("a sequence of the step has fewer blocks than its tokens need")
            stop = start + length - first
            entries += (start, stop, first, block_start)
            start, block_start = stop, block_start + len(table)
        self.num_rows = start
        self.unwritten = unwritten
        self.entries: Ints = np.array(entries, np.int64).reshape(-1, 4)
        # rows [starts[i], stops[i]) are the i-th sequence's; its blocks begin at block_starts[i]
        self.starts, self.stops, self.firsts, self.block_starts = self.entries.T
        self.blocks: Ints = np.fromiter(chain.from_iterable(block_tables), np.int64, block_start)
        self._block_size = block_size

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def lengths(self) -> Ints:
        """[num_sequences]: tokens up to the last row."""
        return self.firsts + self.stops - self.starts

    @cached_property
    def positions(self) -> Ints:
        """[num_rows], each in its sequence."""
        if self.num_rows == len(self):
            return self.firsts.copy()
        return np.arange(self.num_rows) + self._of_rows(self.firsts - self.starts)

    @cached_property
    def slots(self) -> Ints:
        """[num_rows]: where keys and values are written; -1: nowhere."""
        block, offset = np.divmod(self.positions, self._block_size)
        slots: Ints = self.blocks[block + self._of_rows(self.block_starts)] * self._block_size + offset
        slots[list(self.unwritten)] = -1
        return slots

    def _of_rows(self, values: Ints) -> Ints:
        return np.repeat(values, self.stops - self.starts)


class Segment(NamedTuple):
    """Rows `start` to `stop` use one adapter at `scale`, or as much of it as each takes in a mixture.

    Those of a mixture's members follow one another, in order, over the same rows.
    """

    weights: "AdapterWeights"
    scale: float
    start: int
    stop: int
    route: "Route | None" = None


class Segments:
    """Which rows use which adapters, in the order of the rows, in one of the two row spaces."""

    def __init__(self, segments: Sequence[Segment] = ()) -> None:
        self.adapters: Sequence[AdapterWeights] = [segment.weights for segment in segments]
        self.scales: Floats = np.array([segment.scale for segment in segments], np.float64)
        self.starts: Ints = np.array([segment.start for segment in segments], np.int64)
        self.stops: Ints = np.array([segment.stop for segment in segments], np.int64)
        self._segments = segments

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments)

    def __len__(self) -> int:
        return len(self._segments)

    def has_same_rows(self, other: "Segments") -> bool:
        """Whether these are of the same rows, adapters and scales, in the same order."""
        return list(self) == list(other)

    @cached_property
    def adding(self) -> "Segments":
        """Those whose adapters add to linears."""
        return Segments([segment for segment in self if segment.weights.modules])

    @cached_property
    def routed(self) -> "Segments":
        """Those of members of mixtures, in which each row takes a share of its own. No others are of their rows."""
        return Segments([segment for segment in self if segment.route is not None])

    @cached_property
    def replacing(self) -> "Segments":
        """Those whose adapters have modules of their own in place of the base's. They do not overlap."""
        return Segments([segment for segment in self if segment.weights.replaced])

    @cached_property
    def embedding(self) -> "Segments":
        """Those whose adapters change looked-up rows."""
        return Segments([segment for segment in self if segment.weights.embeddings])


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Row i is a token of some sequence."""

    token_ids: Ints  # [num_rows]
    runs: Runs  # positions, blocks and slots
    wants: Ints  # [num_rows], of `Wants`
    head_rows: Ints  # ascending: the rows that reach the output head, at least one
    tokens: Segments  # over all rows
    head: Segments  # over `head_rows`
