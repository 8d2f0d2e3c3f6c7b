"""For how many rows steps are recorded, and where their words lie. Imports neither torch nor triton."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from swaplora_server.kernels.cuda.attention_runs import SEGMENT, Room
from swaplora_server.kernels.cuda.lora_tiles import Capacity

_SMALL = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_APART = 32  # beyond those
# what a row has room for, on average: a step that needs more is launched one operation at a time
_ADAPTERS = 4  # that are summed
_RANKS = 512  # of them together
_SHARERS = 4  # of one block: each reads it by itself


def bucket_sizes(max_rows: int) -> list[int]:
    """Of how many rows steps are recorded, so that each of up to `max_rows` fits into one of them; ascending."""
    sizes = (*_SMALL, *range(_SMALL[-1] + _APART, max_rows, _APART))
    return [*(size for size in sizes if size < max_rows), max_rows]


def bucket_for(num_rows: int, sizes: Sequence[int]) -> int | None:
    """The least of ascending `sizes` that has room; None where none has."""
    place = bisect_left(sizes, num_rows)
    return sizes[place] if place < len(sizes) else None


class Layout(NamedTuple):
    """The words of a recorded step, in this order: token ids, positions, LoRA's tiles, attention's runs.

    Blocks come last, of which there are many in none but the longest contexts: the rest of them need not be copied.
    """

    rows: int
    lora: Capacity | None  # None: no adapter adds to anything
    room: Room

    @property
    def lora_words(self) -> int:
        """Of LoRA's tiles."""
        return 0 if self.lora is None else self.lora.num_words

    @property
    def num_words(self) -> int:
        """Of all."""
        return 2 * self.rows + self.lora_words + self.room.num_words

    def num_used(self, num_blocks: int) -> int:
        """Of a step whose runs are over so many blocks."""
        return self.num_words - self.room.blocks + num_blocks


def layout_of(rows: int, *, has_lora: bool, num_blocks: int, block_size: int) -> Layout:
    """Of a bucket, over a cache of `num_blocks`."""
    sharers = min(rows, _SHARERS)
    items = rows + sharers * -(-num_blocks * block_size // SEGMENT)
    capacity = Capacity(rows, rows * _ADAPTERS, rows * _RANKS) if has_lora else None
    return Layout(rows, capacity, Room(rows, rows, items, rows + sharers * num_blocks))
