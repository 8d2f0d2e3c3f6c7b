"""The pool of KV blocks: each block is in one state, and no block is handed out that somebody holds."""

import pytest

from swaplora_server.engine.kv_cache import BlockPool


def test_a_block_cannot_be_released_twice() -> None:
    pool = BlockPool(4, 4)
    table: list[int] = []
    pool.grow(table, 8)
    copy = list(table)
    pool.release(table)
    with pytest.raises(KeyError):
        pool.release(copy)


def test_block_zero_is_never_handed_out() -> None:
    pool = BlockPool(4, 4)
    table: list[int] = []
    pool.grow(table, 16)
    assert sorted(table) == [1, 2, 3, 4]


def test_a_block_that_two_hold_is_free_when_both_have_let_go() -> None:
    pool = BlockPool(4, 4)
    first: list[int] = []
    pool.grow(first, 8)
    pool.publish(first[0], b"key")
    second: list[int] = []
    pool.share(second, pool.find([b"key", b"another"]))
    assert second == first[:1]
    pool.check_integrity([first, second])
    pool.release(first, [b"key"])
    assert pool.num_free == 3
    pool.grow(first, 12)
    assert not set(first) & set(second), "a block was handed out that somebody held"
    pool.check_integrity([first, second])


def test_a_count_of_holders_that_is_wrong_is_noticed() -> None:
    pool = BlockPool(4, 4)
    table: list[int] = []
    pool.grow(table, 8)
    for wrong in ([], [table, table], [table[:1]]):
        with pytest.raises(RuntimeError, match="held by more or fewer"):
            pool.check_integrity(wrong)


def test_a_block_that_was_computed_again_counts_as_used_and_goes_behind_its_tail() -> None:
    pool = BlockPool(4, 4)
    keys = [b"head", b"middle", b"tail"]
    first: list[int] = []
    pool.grow(first, 8)
    for block, key in zip(first, keys, strict=False):
        pool.publish(block, key)
    pool.release(first, keys[:2])
    second: list[int] = []
    pool.share(second, pool.find(keys[:1]))
    pool.grow(second, 12)
    pool.publish(second[2], keys[2])
    pool.release(second, keys)
    left = []
    for num_blocks in range(1, 5):
        pool.grow(first, num_blocks * 4)
        left.append(len(pool.find(keys)))
    assert left == [3, 2, 1, 0]
