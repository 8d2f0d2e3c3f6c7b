"""A step's runs as the GPU's attention reads them, in one array of int64: one copy a step brings it to the device."""

from typing import NamedTuple

import numpy as np

from swaplora_server.kernels.cuda.lora_tiles import CapacityError
from swaplora_server.kernels.step import Ints, Runs

SEGMENT = 512  # keys that are summed from nothing; the order of a row's sums hangs on it
DECODE_WORDS = 3  # row, position, first item
ITEM_WORDS = 4  # row, position, where its blocks begin, segment
TILE_WORDS = 5  # first row, rows, position of the first, where its blocks begin, first of its rows and heads


class Room(NamedTuple):
    """What an array has room for; its parts in this order, after the count of items."""

    slots: int  # rows
    decodes: int  # runs of one row
    items: int  # their segments
    blocks: int

    @property
    def num_words(self) -> int:
        """Of a whole array."""
        return sum(self.part_words)

    @property
    def part_words(self) -> tuple[int, int, int, int, int]:
        """Of the count, and of each part."""
        return 1, self.slots, self.decodes * DECODE_WORDS, self.items * ITEM_WORDS, self.blocks


def decoding(runs: Runs) -> Ints:
    """Which runs are of one row."""
    return np.flatnonzero(runs.stops - runs.starts == 1)


def room_for(runs: Runs) -> Room:
    """The least that holds them."""
    decodes = decoding(runs)
    return Room(runs.num_rows, len(decodes), int(_segments(runs, decodes).sum()), len(runs.blocks))


def write(runs: Runs, words: Ints, room: Room) -> None:
    """Into an array [room.num_words]. Raises CapacityError, and writes nothing then.

    Rows that there is room for and no run has: their slot is -1, and as decoding rows they see nothing.
    """
    for name, needed, held in zip(Room._fields, room_for(runs), room, strict=True):
        if needed > held:
            raise CapacityError(f"a step of {needed} {name} has room for {held}")
    count, slots, decodes, items, blocks = np.split(words, np.cumsum(room.part_words)[:-1])
    numbers = decoding(runs)
    segments = _segments(runs, numbers)
    first_items = np.cumsum(segments) - segments
    slots[:] = -1
    slots[: runs.num_rows] = runs.slots
    beyond = runs.num_rows + np.arange(room.decodes - len(numbers))
    rows = np.concatenate([runs.starts[numbers], np.minimum(beyond, max(0, room.slots - 1))])
    places = decodes.reshape(-1, DECODE_WORDS)
    places[:] = np.stack([rows, np.full_like(rows, -1), np.zeros_like(rows)], 1)
    places[: len(numbers), 1], places[: len(numbers), 2] = runs.firsts[numbers], first_items
    count[0] = segments.sum()
    of_items = np.repeat(np.arange(len(numbers)), segments)
    run = numbers[of_items]
    segment = np.arange(len(run)) - first_items[of_items]
    items.reshape(-1, ITEM_WORDS)[: len(run)] = np.stack(
        [runs.starts[run], runs.firsts[run], runs.block_starts[run], segment], 1
    )
    blocks[: len(runs.blocks)] = runs.blocks


def prefill_tiles(runs: Runs, group: int, queries: int) -> Ints:
    """[num_tiles, TILE_WORDS]: runs of several rows, `queries` of their rows and heads to a tile; long contexts first.

    `group` heads share a KV head.
    """
    numbers = np.flatnonzero(runs.stops - runs.starts > 1)
    num_rows = (runs.stops - runs.starts)[numbers]
    tiles = -(-num_rows * group // queries)
    run = np.repeat(np.arange(len(numbers)), tiles)
    flat = (np.arange(len(run)) - (np.cumsum(tiles) - tiles)[run]) * queries
    run, rows = numbers[run], num_rows[run]
    found = np.stack([runs.starts[run], rows, runs.firsts[run], runs.block_starts[run], flat], 1)
    longest_first: Ints = np.argsort(-(runs.firsts[run] + flat // group), kind="stable")
    ordered: Ints = found[longest_first]
    return ordered


def _segments(runs: Runs, numbers: Ints) -> Ints:
    needed: Ints = -(-runs.lengths[numbers] // SEGMENT)
    return needed
