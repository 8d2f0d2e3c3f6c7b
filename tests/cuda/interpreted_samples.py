"""The interpreter itself: masks, and products in float32 and float16."""

import pytest
import torch

from sample_kernels import double, square


def test_what_a_mask_leaves_out_is_not_written() -> None:
    x, y = torch.arange(8.0), torch.full((8,), -1.0)
    double[(2,)](x, y, 5, BLOCK=4)
    assert y.tolist() == [0, 2, 4, 6, 8, -1, -1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_product_is_right(dtype: torch.dtype) -> None:
    x = torch.randn(16, 16).to(dtype)
    y = torch.empty_like(x)
    square[(1,)](x, y, SIZE=16)
    torch.testing.assert_close(y, x @ x.t())
