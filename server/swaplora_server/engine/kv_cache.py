"""The block pool of the paged KV cache: which blocks are held, which are free, which can be found by their tokens.

Imports no torch; the tensors live with attention, which reads them through block tables. A full block that was computed
is published under a key that stands for its tokens and for all that came before them (see block_keys.py). It stays
findable after its last holder has let go of it, until its memory is needed: free blocks that nobody can look for go
first, then the least recently used. Only full blocks are ever shared, and a full block is never written to again.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from itertools import chain


class BlockPool:
    """Hands out block ids 1 to num_blocks. Block 0 is never handed out: it stays zero, and padding points at it."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._unused = list(range(num_blocks, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # free and findable, least recently used first
        self._num_holders: dict[int, int] = {}
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, findable or not."""
        return len(self._unused) + len(self._cached)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that can be found, held or not."""
        return len(self._block_of)

    @property
    def capacity(self) -> int:
        """Tokens that fit when nothing else runs."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks published under the first of `keys`, up to one that is not there."""
        found: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_taken(self, found: Sequence[int], num_tokens: int) -> int:
        """How many free blocks a table of `num_tokens` that begins with `found` takes; those held already cost none."""
        return self.blocks_for(num_tokens) - sum(block in self._num_holders for block in found)

    def num_released(self, block_table: Iterable[int], shared: Collection[int]) -> int:
        """How many blocks are free for another once a table lets go of them: those of no other, but for `shared`."""
        return sum(self._num_holders[block] == 1 and block not in shared for block in block_table)

    def share(self, block_table: list[int], found: Sequence[int]) -> None:
        """Append what `find` has just found to an empty `block_table`, as one more holder."""
        for block in found:
            self._cached.pop(block, None)
            self._num_holders[block] = self._num_holders.get(block, 0) + 1
        block_table.extend(found)

    def can_grow(self, block_table: list[int], num_tokens: int) -> bool:
        """Whether `block_table` can be made to hold `num_tokens`."""
        return self.blocks_for(num_tokens) - len(block_table) <= self.num_free

    def grow(self, block_table: list[int], num_tokens: int) -> None:
        """Append blocks until `block_table` holds `num_tokens`. Ask `can_grow` first; raises KeyError otherwise."""
        for _ in range(self.blocks_for(num_tokens) - len(block_table)):
            block = self._unused.pop() if self._unused else self._evict()
            self._num_holders[block] = 1
            block_table.append(block)

    def publish(self, block: int, key: bytes) -> None:
        """Let a held block whose every token has been computed be found under `key`.

        Where another block has the key already, that one keeps it and counts as used just now.
        """
        published = self._block_of.setdefault(key, block)
        if published == block:
            self._key_of[block] = key
        elif published in self._cached:
            self._cached.move_to_end(published)

    def forget(self, block_table: Iterable[int]) -> None:
        """Let none of these held blocks be found any more."""
        for block in block_table:
            key = self._key_of.pop(block, None)
            if key is not None:
                del self._block_of[key]

    def release(self, block_table: list[int], keys: Sequence[bytes] = ()) -> None:
        """Let go of every block of `block_table`, and empty it. Raises KeyError for a block that was not held.

        `keys` are those of its first blocks, as far as they are full and computed; they are findable from now on even
        where another had published and lost them. The last block goes first, so that it is evicted before its head.
        """
        for index in reversed(range(len(block_table))):
            block = block_table[index]
            num_others = self._num_holders[block] - 1
            if index < len(keys):
                self.publish(block, keys[index])
            if num_others:
                self._num_holders[block] = num_others
                continue
            del self._num_holders[block]
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._unused.append(block)
        block_table.clear()

    def check_integrity(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Raise RuntimeError unless `block_tables` are all that is held, and each block and key is where it belongs."""
        counted: dict[int, int] = {}
        for block in chain.from_iterable(block_tables):
            counted[block] = counted.get(block, 0) + 1
        if counted != self._num_holders:
            raise RuntimeError("the block pool is broken: blocks are held by more or fewer than it knows")
        states = [*self._unused, *self._cached, *self._num_holders]
        if sorted(states) != list(range(1, self.num_blocks + 1)):
            raise RuntimeError(
                f"the block pool is broken: {len(self._unused)} unused, {len(self._cached)} cached, "
                f"{len(self._num_holders)} held of {self.num_blocks}"
            )
        if self._block_of != {key: block for block, key in self._key_of.items()}:
            raise RuntimeError("the block pool is broken: keys and blocks do not name each other")
        if not self._cached.keys() <= self._key_of.keys() or not self._key_of.keys().isdisjoint(self._unused):
            raise RuntimeError("the block pool is broken: a cached block has no key, or an unused block has one")

    def _evict(self) -> int:
        """Take the least recently used free block from whoever might have looked for it."""
        block, _ = self._cached.popitem(last=False)
        self.forget([block])
        return block
