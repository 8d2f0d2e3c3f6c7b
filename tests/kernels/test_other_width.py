"""The kernels in the width that this processor does not prefer."""

from kernel_variants import run_tests
from swaplora_server.kernels.cpu import build

KERNEL_TESTS = tuple(
    f"test_{name}.py" for name in ("linear", "linear_bf16", "attention", "whole_attention", "lora", "quantised_linear")
)


def test_the_kernels_are_right_in_the_other_width_too() -> None:
    """Their own tests once more. What is too wide for this processor, the compiler does in parts."""
    run_tests([{"SWAPLORA_KERNEL_LANES": str(24 - build.variant().lanes)}], KERNEL_TESTS)
