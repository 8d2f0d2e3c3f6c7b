"""Buckets have room for every step that is decoded, waste few rows, and their words overlap nowhere."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swaplora_server.kernels.cuda.attention_runs import DECODE_WORDS, room_for, write
from swaplora_server.kernels.cuda.graphs.buckets import bucket_for, bucket_sizes, layout_of
from swaplora_server.kernels.cuda.lora_tiles import CapacityError
from swaplora_server.kernels.cuda.words import Words
from swaplora_server.kernels.step import Runs

MOST = st.integers(1, 400)


def test_the_sizes_are_those_that_others_have() -> None:
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(40) == [1, 2, 4, 8, 16, 24, 32, 40]
    assert bucket_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert bucket_sizes(130) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 130]


@given(MOST, st.data())
def test_each_step_is_padded_to_the_least_bucket_that_has_room(most: int, data: st.DataObject) -> None:
    sizes = bucket_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    num_rows = data.draw(st.integers(1, most))
    chosen = bucket_for(num_rows, sizes)
    assert chosen == min(size for size in sizes if size >= num_rows)
    assert chosen - num_rows < max(num_rows, 1) + 1
    assert chosen - num_rows < 32
    assert bucket_for(most + 1, sizes) is None


@given(st.integers(1, 40), st.integers(1, 600), st.integers(1, 64), st.booleans())
def test_the_parts_of_a_layout_lie_one_after_the_other(rows: int, blocks: int, block_size: int, has_lora: bool) -> None:
    layout = layout_of(rows, has_lora=has_lora, num_blocks=blocks, block_size=block_size)
    parts = [rows, rows, layout.lora_words, *layout.room.part_words]
    assert sum(parts) == layout.num_words
    assert layout.num_used(0) == layout.num_words - parts[-1], "blocks are last"
    assert layout.num_used(layout.room.blocks) == layout.num_words
    assert (layout.lora is not None) == has_lora


@given(st.data())
def test_a_bucket_holds_sequences_that_fill_the_cache_and_share_it(data: st.DataObject) -> None:
    """Up to four times over, however long each is; and those that are not there see nothing and write nothing."""
    rows = data.draw(st.integers(1, 20))
    num_blocks, block_size = data.draw(st.integers(4, 90)), data.draw(st.sampled_from([1, 16, 100]))
    layout = layout_of(rows, has_lora=False, num_blocks=num_blocks, block_size=block_size)
    count = data.draw(st.integers(0, rows))
    share = max(1, min(num_blocks, 4 * num_blocks // max(1, count)))
    tables = [[1] * data.draw(st.integers(1, share)) for _ in range(count)]
    lengths = [len(table) * block_size for table in tables]
    runs = Runs([length - 1 for length in lengths], lengths, tables, block_size)
    assert all(needed <= held for needed, held in zip(room_for(runs), layout.room, strict=True))
    words = Words.zeros(layout.room.num_words, torch.device("cpu"))
    words.writable()[:] = -5
    write(runs, words.writable(), layout.room)
    words.send()
    _, slots, decodes, *_ = np.split(words.on_device.numpy(), np.cumsum(layout.room.part_words)[:-1])
    assert (slots[count:] == -1).all()
    assert (slots[:count] >= 0).all()
    places = decodes.reshape(-1, DECODE_WORDS)
    assert places[:count, 1].tolist() == runs.firsts.tolist()
    assert (places[count:, 1] == -1).all()
    assert sorted(places[:, 0].tolist()) == list(range(rows)), "each row of the output is written"


def test_what_is_beyond_a_bucket_is_refused_before_anything_is_written() -> None:
    layout = layout_of(2, has_lora=False, num_blocks=4, block_size=16)
    words = Words.zeros(layout.room.num_words, torch.device("cpu"))
    runs = Runs([0] * 3, [1] * 3, [[1]] * 3, 16)
    with pytest.raises(CapacityError, match="3 slots has room for 2"):
        write(runs, words.writable(), layout.room)
    assert not words.writable().any()


def test_the_device_sees_what_was_sent_and_parts_are_parts() -> None:
    words = Words.zeros(6, torch.device("cpu"))
    part = words.part(2, 3)
    part.writable()[:] = (1, 2, 3)
    words.writable()[0] = 9
    assert words.on_device.tolist() == [0] * 6
    part.send(2)
    assert words.on_device.tolist() == [0, 0, 1, 2, 0, 0]
    words.send(4)
    assert words.on_device.tolist() == [9, 0, 1, 2, 0, 0]
    words.send()
    assert words.on_device.tolist() == [9, 0, 1, 2, 3, 0]
    assert part.on_device.tolist() == [1, 2, 3]
