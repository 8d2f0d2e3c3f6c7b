"""A function of single numbers gives a number the same bits wherever in a tensor it lies."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.overrides import TorchFunctionMode

from swaplora_server.base.batch_invariant import BatchInvariantMode, make_batch_invariant

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "cos": Tensor.cos,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": nn.functional.silu,
    "gelu": lambda x: gelu(x, approximate="tanh"),
}
NUMBERS = torch.randn(5 * 32768 + 117, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_number_has_the_same_bits_in_a_tensor_of_any_length(name: str) -> None:
    function = FUNCTIONS[name]
    with BatchInvariantMode():
        whole = function(NUMBERS)
        for start, length in [
            (0, 1),
            (5, 63),
            (64, 64),
            (100, 16384),
            (7, 16385),
            (1, 40001),
            (9, 4 * 32768),
            (3, 65536 + 77),
        ]:
            assert torch.equal(function(NUMBERS[start : start + length]), whole[start : start + length])
        assert torch.equal(function(NUMBERS[: 3 * 1000].view(3, 1000).t()), whole[: 3 * 1000].view(3, 1000).t())
    torch.testing.assert_close(whole, function(NUMBERS), atol=1e-6, rtol=1e-5)


def test_what_has_no_numbers_is_left_empty() -> None:
    with BatchInvariantMode():
        assert torch.tanh(torch.empty(0, 3)).shape == (0, 3)


class _BrokenError(Exception):
    pass


class _Capped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.head = nn.GELU(), nn.Linear(5, 259)

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            raise _BrokenError
        return torch.tanh(self.head(self.act(x)) / 30) * 30


class _Heard(TorchFunctionMode):
    """Notes which functions come through it: those that a mode around it lets pass."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, int] = {}

    def __torch_function__(self, function: Any, types: Any, inputs: Any = (), options: Any = None) -> Any:
        if inputs and isinstance(inputs[0], Tensor):
            self.sizes[function.__name__] = inputs[0].numel()
        return function(*inputs, **(options or {}))


def test_activations_and_caps_of_a_model_are_kept_in_whole_vectors_and_no_mode_stays_behind() -> None:
    model = _Capped()
    make_batch_invariant(model, model.head)
    with pytest.raises(_BrokenError):
        model(torch.full((3, 5), float("nan")))
    model.head(torch.ones(1, 5))
    with _Heard() as heard:
        model(torch.ones(3, 5))
        assert heard.sizes["gelu"] == 64, "15 numbers filled up to a whole unit"
        assert heard.sizes["tanh"] == 832
        torch.tanh(torch.ones(7))
        assert heard.sizes["tanh"] == 7
