"""Numbers that come back from a device together are those that were there, bit for bit."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swaplora_server.engine.request import Request, SamplingParams, Sequence
from swaplora_server.engine.sampling import sampler, transfers
from swaplora_server.engine.sampling.sampler import Sampler
from swaplora_server.engine.sampling.transfers import Outgoing, bring, join, part, send, stage

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


SENT = (np.int64, np.float64, np.float32, np.int32, np.uint8)


@given(st.lists(st.tuples(st.sampled_from(SENT), st.integers(0, 9), st.integers(1, 3)), max_size=6))
def test_what_is_staged_for_one_copy_is_parted_again(shapes: list[tuple[type[Any], int, int]]) -> None:
    rng = np.random.default_rng(0)
    given_tensors = [torch.from_numpy(rng.integers(0, 200, shape).astype(kind)) for kind, *shape in shapes]
    again = part(stage(given_tensors, pinned=False), given_tensors)
    assert [(one.dtype, one.tolist()) for one in again] == [(one.dtype, one.tolist()) for one in given_tensors]


def test_a_sampled_step_of_every_kind_sends_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its rows ask for; what comes of it is what comes of numbers that are sent one by one."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 1, "temperature": 0.7},
        {"seed": 2, "top_k": 5, "top_p": 0.9},
        {"seed": 3, "top_k": 9, "min_p": 0.1, "num_logprobs": 3},
        {"seed": 4, "min_p": 0.2, "logit_bias": ((3, 2.0), (8, -1.0))},
        {"seed": 5, "repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"temperature": 0, "allowed_token_ids": frozenset({7, 9}), "num_logprobs": 0},
        {"seed": 6, "min_tokens": 3, "stop_token_ids": frozenset({2})},
    ]
    logits = torch.randn(len(kinds), 300, generator=torch.Generator().manual_seed(0))

    def sequences() -> list[Sequence]:
        return [
            Sequence(Request("r", (1, 2, 5), SamplingParams(max_tokens=10, **params), lambda _event: None), 0)
            for params in kinds
        ]

    expected = Sampler().sample(logits, sequences())
    copies: list[list[torch.Tensor]] = []

    class OnDevice(Outgoing):
        """A device that is the host's memory; what was not sent cannot be read there."""

        def __init__(self, _device: torch.device) -> None:
            super().__init__(torch.device("cuda"))

    class Copied:
        def __init__(self, joined: torch.Tensor) -> None:
            self._joined = joined

        def to(self, _device: torch.device, *, non_blocking: bool) -> torch.Tensor:
            assert non_blocking
            return self._joined

    def staged(tensors: list[torch.Tensor], *, pinned: bool) -> Copied:
        assert pinned
        copies.append(tensors)
        joined = stage(tensors, pinned=False)
        for tensor in tensors:
            tensor.zero_()
        return Copied(joined)

    monkeypatch.setattr(transfers, "stage", staged)
    monkeypatch.setattr(sampler, "Outgoing", OnDevice)
    ours = Sampler().sample(logits, sequences())
    assert ours == expected
    assert len(copies) == 1
    assert len(copies[0]) > 12
