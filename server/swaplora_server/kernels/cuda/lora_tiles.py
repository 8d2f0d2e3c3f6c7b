"""From a step's segments to the tiles that the GPU's LoRA kernels work through. Imports neither torch nor triton.

A tile is up to `TILE_ROWS` contiguous rows that use the same adapters in the same order, its entries. So a weighted sum
is one tile of several entries, and base rows are in none. All of it lies in one buffer of int64, whose size is settled
by a `Capacity`: one copy a step brings it to the device, and kernels read there how much of it counts.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from swaplora_server.kernels.step import Ints, Segments

TILE_ROWS = 16
# the words of a buffer: its counts of tiles and entries, then as many tiles and entries as it has room for
COUNT_WORDS = 2
TILE_WORDS = 4  # first row, rows, first entry, entries
ENTRY_WORDS = 6  # address of the adapter's table, first element in h, elements of a row in h, scale, first row, rows


class CapacityError(ValueError):
    """A step has more of something than its buffers have room for."""


class Capacity(NamedTuple):
    """What buffers have room for."""

    tiles: int
    entries: int
    h_elements: int  # of one module and one plane: see `Tiles`

    @property
    def first_entry_word(self) -> int:
        """Where a buffer's entries begin."""
        return COUNT_WORDS + self.tiles * TILE_WORDS

    @property
    def num_words(self) -> int:
        """Of a whole buffer."""
        return self.first_entry_word + self.entries * ENTRY_WORDS


@dataclass(frozen=True, slots=True)
class Tiles:
    """A step's tiles in the order of their rows.

    h is what shrinking leaves to expanding: of each entry [rows, width], one after the other.
    """

    tiles: Ints  # [num_tiles, TILE_WORDS]
    entries: Ints  # [num_entries, ENTRY_WORDS], tile by tile, each in the order of the segments
    h_elements: int

    @property
    def needs(self) -> Capacity:
        """The least room that holds them."""
        return Capacity(len(self.tiles), len(self.entries), self.h_elements)

    def write(self, words: Ints, capacity: Capacity) -> None:
        """Into a buffer [capacity.num_words]. Raises CapacityError, and writes nothing then."""
        for name, needed, held in zip(Capacity._fields, self.needs, capacity, strict=True):
            if needed > held:
                raise CapacityError(f"a step of {needed} LoRA {name} has room for {held}")
        words[:COUNT_WORDS] = len(self.tiles), len(self.entries)
        words[COUNT_WORDS:][: self.tiles.size] = self.tiles.ravel()
        words[capacity.first_entry_word :][: self.entries.size] = self.entries.ravel()


def tiles_of(segments: Segments, addresses: Ints, widths: Ints) -> Tiles:
    """Of each segment's adapter: its table's address, and the elements that its rows need in h."""
    ranges = _ranges(segments)
    in_range, number = _parts(-(-ranges.lengths // TILE_ROWS))
    starts = ranges.starts[in_range] + number * TILE_ROWS
    rows = np.minimum(ranges.starts[in_range] + ranges.lengths[in_range] - starts, TILE_ROWS)
    num_entries = ranges.num_users[in_range]
    in_tile, number = _parts(num_entries)
    used = ranges.users[ranges.first_users[in_range][in_tile] + number]
    h_lengths = rows[in_tile] * widths[used]
    scales = segments.scales.astype(np.float32).view(np.int32).astype(np.int64)
    entries = (addresses[used], _offsets(h_lengths), widths[used], scales[used], starts[in_tile], rows[in_tile])
    tiles = (starts, rows, _offsets(num_entries), num_entries)
    return Tiles(np.stack(tiles, axis=1), np.stack(entries, axis=1), int(h_lengths.sum()))


class _Ranges(NamedTuple):
    """Where which segments lie over each other: rows between two of their ends."""

    starts: Ints  # [num_ranges], ascending
    lengths: Ints
    first_users: Ints  # [num_ranges]: in `users`
    num_users: Ints
    users: Ints  # numbers of segments, range by range, ascending in each


def _ranges(segments: Segments) -> _Ranges:
    ends = np.unique(np.concatenate((segments.starts, segments.stops)))
    firsts, lasts = np.searchsorted(ends, segments.starts), np.searchsorted(ends, segments.stops)
    user, number = _parts(lasts - firsts)
    used = firsts[user] + number
    order = np.argsort(used, kind="stable")
    ranges, first_users, num_users = np.unique(used[order], return_index=True, return_counts=True)
    return _Ranges(ends[ranges], ends[ranges + 1] - ends[ranges], first_users, num_users, user[order])


def _parts(counts: Ints) -> tuple[Ints, Ints]:
    """Of things with `counts` parts, one after the other: whose each part is, and which of them."""
    whose = np.repeat(np.arange(len(counts)), counts)
    return whose, np.arange(len(whose)) - _offsets(counts)[whose]


def _offsets(lengths: Ints) -> Ints:
    offsets: Ints = np.cumsum(lengths) - lengths
    return offsets
