"""What is read of compiled kernels: instructions and registers, and a stack where these do not suffice."""

import sys

import pytest

from ahead_of_time import CARDS, Form, compile_ahead

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux alone")


def square(size: int, dtype: str, max_registers: int | None = None) -> Form:
    types = {"x": dtype, "y": dtype}
    return Form("sample_kernels:square", types, {"SIZE": size}, num_warps=1, num_stages=1, max_registers=max_registers)


@pytest.mark.parametrize("card", CARDS)
def test_what_the_compiler_says_is_read(card: int) -> None:
    small, large, exact = compile_ahead(
        [square(16, "*bf16"), square(16, "*fp32", max_registers=24), square(16, "*fp32")], card
    )
    assert (small.stack_bytes, small.local_bytes, small.num_threads) == (0, 0, 32)
    assert 8 < small.registers < 128
    assert large.stack_bytes > 0
    assert small.count("mma.sync") > exact.count("mma.sync") == 0


def test_what_does_not_compile_is_said() -> None:
    from triton.compiler.errors import CompilationError  # triton is for Linux alone

    with pytest.raises(CompilationError, match="power of 2"):
        compile_ahead([square(3, "*fp32")], CARDS[0])
