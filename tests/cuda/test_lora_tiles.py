"""Tiles: every row meets the segments that it is in, each once and in order, and base rows meet none."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.kernels.cuda.lora_tiles import (
    COUNT_WORDS,
    ENTRY_WORDS,
    TILE_ROWS,
    TILE_WORDS,
    Capacity,
    CapacityError,
    Tiles,
    tiles_of,
)
from swaplora_server.kernels.step import Segment, Segments

ADAPTER = AdapterWeights("sha256:0", {})
NUM_ROWS = 90
WIDTHS = (0, 16, 32, 64)
spans = st.tuples(
    st.integers(0, NUM_ROWS), st.integers(0, NUM_ROWS), st.floats(-2, 2, width=32), st.sampled_from(WIDTHS)
)
steps = st.lists(spans.map(lambda span: (min(span[:2]), max(span[:2]), *span[2:])), max_size=12)
Step = list[tuple[int, int, float, int]]


def planned(step: Step) -> Tiles:
    """The number of a segment, from 1 on, is the address of its table."""
    segments = Segments([Segment(ADAPTER, scale, start, stop) for start, stop, scale, _ in step])
    widths = np.array([width for *_, width in step], np.int64)
    return tiles_of(segments, np.arange(1, len(step) + 1), widths)


def met(tiles: Tiles) -> dict[int, list[int]]:
    """Of each row in a tile, the segments that it meets, in order. Asserts that no two tiles have a row."""
    found: dict[int, list[int]] = {}
    for first_row, rows, first_entry, num_entries in tiles.tiles.tolist():
        entries = tiles.entries[first_entry : first_entry + num_entries]
        assert [entry[4:] for entry in entries.tolist()] == [[first_row, rows]] * num_entries
        for row in range(first_row, first_row + rows):
            assert row not in found
            found[row] = (entries[:, 0] - 1).tolist()
    return found


@given(steps)
def test_each_row_meets_its_segments_once_and_in_order(step: Step) -> None:
    expected = {
        row: users
        for row in range(NUM_ROWS)
        if (users := [number for number, (start, stop, *_) in enumerate(step) if start <= row < stop])
    }
    assert met(planned(step)) == expected


@given(steps)
def test_tiles_are_small_ascend_and_share_no_entry(step: Step) -> None:
    tiles = planned(step)
    starts, rows, first_entries, num_entries = tiles.tiles.T
    assert (rows > 0).all()
    assert (rows <= TILE_ROWS).all()
    assert (np.diff(starts) > 0).all()
    assert (num_entries > 0).all()
    np.testing.assert_array_equal(first_entries, np.cumsum(num_entries) - num_entries)
    assert num_entries.sum() == len(tiles.entries)


@given(steps)
def test_each_entry_has_the_scale_and_its_own_part_of_h(step: Step) -> None:
    tiles = planned(step)
    taken = np.zeros(tiles.h_elements, int)
    for address, first, width, scale, _, rows in tiles.entries.tolist():
        assert width == step[address - 1][3]
        assert np.int64(scale).astype(np.int32).view(np.float32) == np.float32(step[address - 1][2])
        taken[first : first + rows * width] += 1
    assert (taken == 1).all()


@given(steps, st.tuples(st.integers(0, 20), st.integers(0, 40), st.integers(0, 8000)))
def test_a_buffer_holds_a_step_or_refuses_it_whole(step: Step, room: tuple[int, int, int]) -> None:
    tiles, capacity = planned(step), Capacity(*room)
    words = np.full(capacity.num_words + 1, -7, np.int64)  # one more, which is nobody's
    if any(needed > held for needed, held in zip(tiles.needs, capacity, strict=True)):
        with pytest.raises(CapacityError, match="has room for"):
            tiles.write(words, capacity)
        assert (words == -7).all()
        return
    tiles.write(words, capacity)
    num_tiles, num_entries = words[:COUNT_WORDS].tolist()
    held_tiles = words[COUNT_WORDS:].reshape(-1)[: num_tiles * TILE_WORDS].reshape(-1, TILE_WORDS)
    held_entries = words[capacity.first_entry_word :][: num_entries * ENTRY_WORDS].reshape(-1, ENTRY_WORDS)
    np.testing.assert_array_equal(held_tiles, tiles.tiles)
    np.testing.assert_array_equal(held_entries, tiles.entries)
    assert words[-1] == -7


def test_rows_of_one_kind_share_tiles() -> None:
    """As few as there can be: 40 rows of a sum, 16 at a time, and one of the first alone."""
    tiles = planned([(0, 41, 1.0, 16), (0, 40, 0.5, 32)])
    assert tiles.tiles.tolist() == [[0, 16, 0, 2], [16, 16, 2, 2], [32, 8, 4, 2], [40, 1, 6, 1]]
    assert tiles.needs == Capacity(tiles=4, entries=7, h_elements=41 * 16 + 40 * 32)


def test_a_step_of_no_segments_has_no_tiles() -> None:
    assert planned([]).needs == Capacity(tiles=0, entries=0, h_elements=0)


@pytest.mark.parametrize("module", ["lora_tiles", "lora_shapes", "needs"])
def test_what_plans_imports_neither_torch_nor_triton(module: str) -> None:
    code = f"import sys, swaplora_server.kernels.cuda.{module}; print(*({{'torch', 'triton'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
