"""The pool of KV blocks: which are free and which are held. Imports no torch; the tensors live with attention."""


class BlockPool:
    """Hands out block ids 1 to num_blocks. Block 0 is never handed out: it stays zero, and padding points at it."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks, 0, -1))
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Tokens that fit when nothing else runs."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_grow(self, block_table: list[int], num_tokens: int) -> bool:
        """Whether `block_table` can be made to hold `num_tokens`."""
        return self.blocks_for(num_tokens) - len(block_table) <= self.num_free

    def grow(self, block_table: list[int], num_tokens: int) -> None:
        """Append blocks until `block_table` holds `num_tokens`. Ask `can_grow` first; raises IndexError otherwise."""
        for _ in range(self.blocks_for(num_tokens) - len(block_table)):
            block = self._free.pop()
            self._held.add(block)
            block_table.append(block)

    def release(self, block_table: list[int]) -> None:
        """Take back every block of `block_table` and empty it. Raises KeyError for a block that was not held."""
        for block in reversed(block_table):
            self._held.remove(block)
            self._free.append(block)
        block_table.clear()

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every block is either free or held, once."""
        free = set(self._free)
        if len(free) != len(self._free) or free & self._held or len(free) + len(self._held) != self.num_blocks:
            raise RuntimeError(
                f"block pool is broken: {len(self._free)} free, {len(self._held)} held of {self.num_blocks}"
            )
