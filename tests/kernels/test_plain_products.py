"""Products of halves and bytes without the instructions for them, and in the other order of sums."""

import pytest

from kernel_variants import run_python, run_tests
from swaplora_server.kernels.cpu import build

# the tests of products that not all processors have instructions for
PRODUCTS = ("test_linear_bf16.py", "test_quantised_linear.py", "test_lora.py", "test_panels.py")


@pytest.mark.parametrize("order", ["tiles", "pairs"])
def test_products_are_right_without_the_processors_instructions_for_them(order: str) -> None:
    run_tests({"SWAPLORA_KERNEL_ORDER": order, "SWAPLORA_KERNEL_PLAIN": "1"}, PRODUCTS)


def test_products_are_right_in_the_order_that_this_processor_does_not_prefer() -> None:
    order = "pairs" if build.variant().has_tiles else "tiles"
    run_tests({"SWAPLORA_KERNEL_ORDER": order}, PRODUCTS)


@pytest.mark.parametrize("order", ["tiles", "pairs"])
def test_plain_code_gives_the_bits_of_the_instruction(order: str) -> None:
    """In either width. Where the processor has no instruction, all four are plain."""
    digests = {
        run_python(
            {"SWAPLORA_KERNEL_ORDER": order, "SWAPLORA_KERNEL_PLAIN": plain, "SWAPLORA_KERNEL_LANES": lanes}, PRODUCT
        )
        for plain in ("", "1")
        for lanes in ("8", "16")
    }
    assert len(digests) == 1


PRODUCT = """
import ctypes, hashlib, torch
from dataclasses import replace
from repository import KERNEL_CACHE
from swaplora_adapters.weights.memory import HugePages
from swaplora_adapters.weights.served import AdapterWeights, ModuleWeights
from swaplora_server.kernels.cpu import abi, linear, quantised_linear
from swaplora_server.kernels.cpu.backend import CpuBackend
from swaplora_server.kernels.quantised_codes import Codes
from swaplora_server.kernels.step import Segment, Segments
library = abi.load_library(KERNEL_CACHE, lambda _message: None)
digest, generator = hashlib.sha256(), torch.Generator().manual_seed(1)
for scale in (1.0, 1e-18, 1e-30, 1e25):
    plain = torch.nn.Linear(301, 100)
    for parameter in plain.parameters():
        parameter.data.normal_(generator=generator).mul_(scale)
    packed = linear.pack(library, torch.bfloat16, plain, HugePages())
    for rows in (1, 9, 40):
        x = torch.randn(rows, 301, generator=generator).mul_(scale)
        x[:, ::50] *= 1e-20
        digest.update(packed(x).numpy().tobytes())
codes = torch.randint(-128, 128, (100, 320), generator=generator)
for quantised, table in ((codes.to(torch.int8), None), (codes.to(torch.uint8) & 15, torch.linspace(-1, 1, 16))):
    scales = torch.rand(100, 1 if table is None else 5, generator=generator)
    packed = quantised_linear.QuantisedLinear(library, HugePages(), Codes(quantised, scales, table), None)
    for rows in (1, 4, 9, 40):
        digest.update(packed(torch.randn(rows, 320, generator=generator)).numpy().tobytes())
backend = CpuBackend(library, torch.bfloat16)
for rank in (5, 16, 48):
    factors = [torch.randn(shape, generator=generator) for shape in ((rank, 577), (100, rank))]
    weights = AdapterWeights("", {"here": ModuleWeights(*factors)})
    weights = replace(weights, tables=backend.tables(weights, ["here"]))
    for rows in (1, 2, 9, 40):
        y = torch.randn(rows, 100, generator=generator)
        x = torch.randn(rows, 577, generator=generator)
        backend.lora(Segments([Segment(weights, 0.5, 0, rows)])).add(x, [(y, 0)])
        digest.update(y.numpy().tobytes())
print(digest.hexdigest())
"""
