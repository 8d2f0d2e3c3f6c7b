"""Prefix caching: which computed blocks a sequence may begin with, and what of its own blocks others may find.

Imports no torch. A sequence shares full blocks only, and never the one with its last token: that row is to sample. One
whose prompt is to be scored shares no block with a token that it has yet to score the next of.
"""

from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.request import LAST_PRIORITY, Sequence


class PrefixCache:
    """The sequences' side of the block pool. When it is off, no block is ever found.

    The counters only grow; any thread may read them.
    """

    def __init__(self, pool: BlockPool, *, is_on: bool) -> None:
        self._pool = pool
        self._is_on = is_on
        self._being_computed: set[bytes] = set()  # keys of blocks that running prompts have yet to fill
        self._by_last: set[bytes] = set()  # the same of the last priority, which others do not wait for
        self.num_looked_up_tokens = 0  # of sequences that began, also of those that began again
        self.num_hit_tokens = 0

    def find(self, sequence: Sequence) -> list[int]:
        """The longest run of cached blocks that `sequence` can begin with."""
        return self._pool.find(self._shareable_keys(sequence))

    def is_worth_waiting(self, sequence: Sequence) -> bool:
        """Whether a running prompt is about to fill the first block that `sequence` would have to compute."""
        if not self._is_being_computed(sequence):
            keys = self._shareable_keys(sequence)
            num_found = len(self._pool.find(keys))
            sequence.awaited_key = keys[num_found] if num_found < len(keys) else None
        return self._is_being_computed(sequence)

    def _is_being_computed(self, sequence: Sequence) -> bool:
        """Its awaited block, by one that it waits for."""
        key, is_last = sequence.awaited_key, sequence.priority == LAST_PRIORITY
        return key in self._being_computed or (is_last and key in self._by_last)

    def begin(self, sequence: Sequence, found: list[int]) -> None:
        """Let `sequence`, which holds nothing, begin with what `find` has just found for it."""
        self._pool.share(sequence.block_table, found)
        sequence.num_computed = len(found) * self._pool.block_size
        being_computed = self._by_last if sequence.priority == LAST_PRIORITY else self._being_computed
        being_computed.update(self._keys(sequence, sequence.num_tokens)[len(found) :])
        if self._is_on:
            self.num_looked_up_tokens += sequence.num_tokens
            self.num_hit_tokens += sequence.num_computed
        if sequence.request.num_cached_tokens is None:  # later ones find what the request computed itself
            sequence.request.num_cached_tokens = sequence.num_computed

    def publish(self, sequence: Sequence, start: int, stop: int) -> None:
        """Let the blocks be found that were filled when tokens [start, stop) were computed."""
        first, end = start // self._pool.block_size, stop // self._pool.block_size
        if self._is_on and first < end:
            keys = self._keys(sequence, stop)[first:]
            self._being_computed.difference_update(keys)
            self._by_last.difference_update(keys)
            for block, key in zip(sequence.block_table[first:end], keys, strict=True):
                self._pool.publish(block, key)

    def end(self, sequence: Sequence) -> None:
        """Give its blocks back. Those that were computed whole can be found as long as their memory is not needed."""
        keys = sequence.hashed_keys  # of all that it was to compute, and of all that it has
        num_full = sequence.num_computed // self._pool.block_size
        being_computed = self._by_last if sequence.priority == LAST_PRIORITY else self._being_computed
        being_computed.difference_update(keys[num_full:])
        self._pool.release(sequence.block_table, keys[:num_full])
        sequence.num_computed = 0

    def disown(self, sequence: Sequence) -> None:
        """Let nothing be found that a running sequence which has failed wrote or read, nor when it ends."""
        self._pool.forget(sequence.block_table)
        sequence.num_computed = 0

    def _shareable_keys(self, sequence: Sequence) -> list[bytes]:
        return self._keys(sequence, min(sequence.num_tokens - 1, sequence.num_scored))

    def _keys(self, sequence: Sequence, num_tokens: int) -> list[bytes]:
        """Keys of the blocks that its first `num_tokens` fill."""
        block_size = self._pool.block_size
        return sequence.block_keys(num_tokens // block_size, block_size) if self._is_on else []
