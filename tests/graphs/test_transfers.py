"""Numbers that come back from a device together are those that were there, bit for bit."""

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from swaplora_server.engine.sampling.transfers import bring, join, part, send

NUMBERS = {
    torch.int64: st.integers(-(2**63), 2**63 - 1),
    torch.float64: st.one_of(st.floats(), st.just(-0.0), st.just(math.nan)),
}


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(list(NUMBERS)))
    rows, columns = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    numbers: list[Any] = draw(st.lists(NUMBERS[dtype], min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(numbers, dtype=dtype).view(rows, columns)


@given(st.lists(tensors(), min_size=1, max_size=4))
def test_what_is_joined_for_one_copy_is_parted_again(given_tensors: list[torch.Tensor]) -> None:
    joined = join(given_tensors)
    assert joined.shape == (sum(tensor.numel() for tensor in given_tensors),)
    for again, tensor in zip(part(joined, given_tensors), given_tensors, strict=True):
        assert again.dtype == tensor.dtype
        assert torch.equal(again.view(torch.int64), tensor.view(torch.int64))
    assert str(bring(*given_tensors)) == str([tensor.tolist() for tensor in given_tensors])


def test_what_is_sent_is_there() -> None:
    assert send([1, 2.5], torch.float32, torch.device("cpu")).tolist() == [1, 2.5]
    assert send([], torch.int64, torch.device("cpu")).shape == (0,)
