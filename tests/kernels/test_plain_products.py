"""The kernels in the width that this processor does not prefer; products without its instructions, in each order."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from kernel_variants import Variant, run_tests
from repository import KERNEL_CACHE
from swaplora_adapters.weights.memory import HugePages
from swaplora_adapters.weights.served import AdapterWeights, ModuleWeights
from swaplora_server.kernels.cpu import abi, build, linear, quantised_linear
from swaplora_server.kernels.cpu.backend import CpuBackend
from swaplora_server.kernels.quantised_codes import Codes
from swaplora_server.kernels.step import Segment, Segments

# the tests of products that not all processors have instructions for
PRODUCTS = ("test_linear_bf16.py", "test_quantised_linear.py", "test_lora.py", "test_panels.py")
KERNELS = tuple(
    f"test_{name}.py" for name in ("linear", "linear_bf16", "attention", "whole_attention", "lora", "quantised_linear")
)
ORDERS = ("tiles", "pairs")


def test_kernels_are_right_in_the_other_width_without_instructions_and_in_the_order_that_is_not_preferred() -> None:
    """Their own tests once more. What is too wide for this processor, the compiler does in parts."""
    here = build.variant()
    other = "pairs" if here.has_tiles else "tiles"
    # without AMX the products of tiles are plain code in any case, and all else that is plain knows no order
    orders = ORDERS if "amx_bf16" in build.processor_instructions() else ("pairs",)
    plain = [(form(here.lanes, order, "1"), PRODUCTS) for order in orders]
    run_tests([(form(24 - here.lanes, "", ""), KERNELS), *plain, (form(here.lanes, other, ""), PRODUCTS)])


def form(lanes: int, order: str, plain: str) -> Variant:
    return {
        "SWAPLORA_KERNEL_LANES": str(lanes),
        "SWAPLORA_KERNEL_ORDER": order,
        "SWAPLORA_KERNEL_PLAIN": plain,
    }


@pytest.mark.parametrize("order", ORDERS)
def test_plain_code_gives_the_bits_of_the_instruction(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In either width. Where the processor has no instruction, all four are plain."""
    monkeypatch.setenv("SWAPLORA_KERNEL_ORDER", order)
    digests = set()
    for plain, lanes in product(("", "1"), (8, 16)):
        monkeypatch.setenv("SWAPLORA_KERNEL_PLAIN", plain)
        monkeypatch.setenv("SWAPLORA_KERNEL_LANES", str(lanes))
        assert build.variant() == build.Variant(lanes, order == "tiles", bool(plain))
        digests.add(digest_of_products(CpuBackend(abi.load_library(KERNEL_CACHE, print), torch.bfloat16)))
    assert len(digests) == 1


def digest_of_products(backend: CpuBackend) -> str:
    """Of the bits of linears of each format, and of adapters."""
    digest, generator = hashlib.sha256(), torch.Generator().manual_seed(1)
    for products in (of_linears, of_codes, of_adapters):
        for y in products(backend, generator):
            digest.update(y.numpy().tobytes())
    return digest.hexdigest()


def of_linears(backend: CpuBackend, generator: torch.Generator) -> Iterator[Tensor]:
    for scale in (1.0, 1e-18, 1e-30, 1e25):
        plain = nn.Linear(301, 100)
        for parameter in plain.parameters():
            parameter.data.normal_(generator=generator).mul_(scale)
        packed = linear.pack(backend.library, torch.bfloat16, plain, HugePages())
        assert packed is not None
        for rows in (1, 9, 40):
            x = torch.randn(rows, 301, generator=generator).mul_(scale)
            x[:, ::50] *= 1e-20
            yield packed(x)


def of_codes(backend: CpuBackend, generator: torch.Generator) -> Iterator[Tensor]:
    codes = torch.randint(-128, 128, (100, 320), generator=generator)
    for quantised, table in ((codes.to(torch.int8), None), (codes.to(torch.uint8) & 15, torch.linspace(-1, 1, 16))):
        scales = torch.rand(100, 1 if table is None else 5, generator=generator)
        packed = quantised_linear.QuantisedLinear(backend.library, HugePages(), Codes(quantised, scales, table), None)
        for rows in (1, 4, 9, 40):
            yield packed(torch.randn(rows, 320, generator=generator))


def of_adapters(backend: CpuBackend, generator: torch.Generator) -> Iterator[Tensor]:
    for rank in (5, 16, 48):
        factors = [torch.randn(shape, generator=generator) for shape in ((rank, 577), (100, rank))]
        weights = AdapterWeights("", {"here": ModuleWeights(*factors)})
        weights = replace(weights, tables=backend.tables(weights, ["here"]))
        for rows in (1, 2, 9, 40):
            y = torch.randn(rows, 100, generator=generator)
            x = torch.randn(rows, 577, generator=generator)
            backend.lora(Segments([Segment(weights, 0.5, 0, rows)])).add(x, [(y, 0)])
            yield y
