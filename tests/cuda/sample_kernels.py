"""Kernels that only try what runs and compiles kernels."""

import triton
import triton.language as tl


@triton.jit
def double(x: tl.tensor, y: tl.tensor, num_elements: tl.tensor, BLOCK: tl.constexpr) -> None:
    """y = 2 · x.

    x, y: [num_elements].
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < num_elements), mask=at < num_elements)


@triton.jit
def square(x: tl.tensor, y: tl.tensor, SIZE: tl.constexpr) -> None:
    """y = x xᵀ.

    x, y: [SIZE, SIZE].
    """
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    rows = tl.load(x + at)
    tl.store(y + at, tl.dot(rows, rows.T, input_precision="ieee").to(y.dtype.element_ty))
