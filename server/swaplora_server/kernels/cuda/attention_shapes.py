"""The shapes of attention's tiles on a GPU, in fixed tables: none is found by trying, so a row's bits never change."""

from typing import NamedTuple

AHEAD = 4  # segments that `attention_fold` reads at once
PROGRAMS_PER_PROCESSOR = 2


class Shape(NamedTuple):
    """Of prompts and decoding rows alike."""

    queries: int  # rows and heads of a tile
    keys: int  # of a tile
    values: int  # value dims of a program
    num_warps: int
    num_stages: int


class HeadSizeError(ValueError):
    """A head is larger than the kernels' tiles."""


def padded(size: int) -> int:
    """To a power of two that products take."""
    return max(16, 1 << (size - 1).bit_length())


def shape_of(dtype: str, head_dim: int, value_dim: int) -> Shape:
    """`dtype` is float32, float16 or bfloat16. Raises HeadSizeError."""
    largest = 128 if dtype == "float32" else 256
    if max(head_dim, value_dim) > largest:
        raise HeadSizeError(f"attention heads of {max(head_dim, value_dim)} in {dtype} are larger than {largest}")
    values = min(64, padded(value_dim))
    if dtype == "float32":
        return Shape(32 if padded(head_dim) == 64 else 16, 32, values, 4, 1)
    return Shape(64, 64 if padded(head_dim) <= 128 else 32, values, 4, 3 if padded(head_dim) == 64 else 2)
