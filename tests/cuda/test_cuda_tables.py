"""What the GPU's kernels read of an adapter: its own tensors where these lie as they are read, and copies of others."""

import importlib.util
from dataclasses import replace
from importlib.machinery import ModuleSpec

import pytest
import torch
from torch import Tensor

from swaplora_adapters.weights.served import AdapterWeights, ModuleWeights
from swaplora_server.kernels.cuda.adapter_tables import ADDS, IS_BF16_A, IS_BF16_B, WORDS, AdapterTables, tables_of
from swaplora_server.kernels.cuda.needs import NoTritonError, require_triton

CPU = torch.device("cpu")
PATHS = ("elsewhere", "here")


def module(rank: int = 5, dtype: torch.dtype = torch.float32) -> ModuleWeights:
    return ModuleWeights(torch.randn(rank, 12).to(dtype), torch.randn(rank, 8).to(dtype).t(), torch.randn(8))


def row(weights: ModuleWeights, dtype: torch.dtype = torch.float32) -> tuple[list[int], AdapterTables]:
    tables = AdapterTables(AdapterWeights("sha256:0", {"here": weights}), PATHS, dtype, CPU)
    return tables._words[1].tolist(), tables  # noqa: SLF001 - what kernels read


def read(address: int, tables: AdapterTables) -> Tensor:
    """What lies there, as the table keeps it."""
    (tensor,) = (tensor for tensor in tables._read if tensor.data_ptr() == address)  # noqa: SLF001
    return tensor


def test_an_adapters_own_tensors_are_pointed_to() -> None:
    weights = module()
    assert weights.column_scale is not None
    words, tables = row(weights)
    own = (weights.lora_A, weights.lora_B, weights.column_scale)
    assert words == [*(tensor.data_ptr() for tensor in own), 0, 5, ADDS, 0, 0]
    assert tables.width == 16


def test_what_an_adapter_does_not_target_is_all_zero() -> None:
    tables = AdapterTables(AdapterWeights("sha256:0", {"here": module()}), PATHS, torch.float32, CPU)
    assert tables._words[0].tolist() == [0] * WORDS  # noqa: SLF001


@pytest.mark.parametrize("rows", [torch.float32, torch.float16, torch.bfloat16])
def test_bfloat16_is_read_as_it_is(rows: torch.dtype) -> None:
    """The flags say so beside rows in another format."""
    weights = module(dtype=torch.bfloat16)
    words, _ = row(weights, rows)
    assert words[:2] == [weights.lora_A.data_ptr(), weights.lora_B.data_ptr()]
    assert words[5] == (ADDS if rows == torch.bfloat16 else ADDS | IS_BF16_A | IS_BF16_B)
    mixed = replace(weights, lora_A=weights.lora_A.to(rows))
    assert row(mixed, rows)[0][5] == (ADDS if rows == torch.bfloat16 else ADDS | IS_BF16_B)


def test_what_lies_otherwise_is_copied() -> None:
    """B row by row, factors in another format, vectors in half precision, an odd address."""
    plain = module()
    assert plain.column_scale is not None
    memory = torch.empty(plain.lora_A.numel() + 1)
    odd = memory[1:].view(plain.lora_A.shape).copy_(plain.lora_A)
    for other in (
        replace(plain, lora_B=plain.lora_B.contiguous()),
        replace(plain, lora_A=plain.lora_A.double(), lora_B=plain.lora_B.double()),
        replace(plain, column_scale=plain.column_scale.double()),
        replace(plain, lora_A=odd),
    ):
        words, tables = row(other)
        lora_A, lora_B, column_scale = (read(address, tables) for address in words[:3])
        assert all(address % 16 == 0 for address in words[:3])
        assert torch.equal(lora_A, plain.lora_A)
        assert torch.equal(lora_B, plain.lora_B.t())
        assert lora_B.is_contiguous()
        assert torch.equal(column_scale, plain.column_scale)
        assert {tensor.dtype for tensor in (lora_A, lora_B, column_scale)} == {torch.float32}


def test_tables_are_of_prepared_adapters_alone() -> None:
    weights = AdapterWeights("sha256:0", {"here": module()})
    prepared = replace(weights, tables=AdapterTables(weights, PATHS, torch.float16, CPU))
    assert tables_of([prepared], torch.float16) == [prepared.tables]
    for adapter, dtype in ((weights, torch.float16), (prepared, torch.float32)):
        with pytest.raises(RuntimeError, match=f"not prepared for .* rows in {dtype}"):
            tables_of([adapter], dtype)


def test_what_is_missing_is_said_before_kernels_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def found_nothing(_name: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", found_nothing)
    with pytest.raises(NoTritonError, match="triton, which is not installed"):
        require_triton()
