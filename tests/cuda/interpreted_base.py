"""A whole tiny base on the GPU's kernels, proof at start and adapters included, equals one on torch's operations."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.weights.load import load_weights
from swaplora_adapters.weights.router import Prototypes, Route, Router
from swaplora_server.base.base_model import BaseModel, load_base
from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.request import AdapterUse, Request, SamplingParams, Sequence
from swaplora_server.engine.scheduling.batch import Batch, rows_of
from swaplora_server.kernels.cuda import decoder
from swaplora_server.kernels.cuda.backend import CudaBackend
from swaplora_server.kernels.cuda.decoder import CudaDecoder
from swaplora_server.kernels.pick import torch_backend
from swaplora_server.kernels.step import Segments

CPU = torch.device("cpu")
ADAPTERS: dict[str, dict[str, Any]] = {"plain": {"rank": 5}, "dora": {"use_dora": True}, "wide": {"rank": 40}}


HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
# with angles and norms as its kind has them, in as many layers as tell one from the next
BASES: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {**tiny.LLAMA, **HEADS},
    torch.float16: {**tiny.LLAMA, **HEADS, "model_type": "qwen3", "num_hidden_layers": 1},
}


@pytest.mark.parametrize("dtype", BASES)
def test_a_base_and_its_adapters_are_those_of_torchs_operations(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tiny.save_tiny_base(tmp_path / "base", BASES[dtype])
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        tiny.save_adapter(tmp_path / name, folder, seed=seed, **fields)
    base, of_torch = (
        load_base(folder, device=CPU, dtype=dtype, backend=backend)
        for backend in (CudaBackend(CPU, dtype), torch_backend(CPU))
    )
    fused = base.model.model.layers[0]
    assert isinstance(fused, CudaDecoder)
    assert [linear.joined is None for linear in fused._layers[0].linears] == [*3 * [False], True, *2 * [False], True]  # noqa: SLF001
    ours, expected = logprobs(base, tmp_path), logprobs(of_torch, tmp_path)
    assert (ours - expected).abs().max() < (1e-4 if dtype == torch.float32 else 2e-2)


def test_fused_layers_that_are_wrong_with_adapters_alone_are_not_put_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here their own norms are left out."""
    folder = tiny.save_tiny_base(tmp_path, {**tiny.LLAMA, **HEADS, "num_hidden_layers": 1})
    spans = decoder.spans_of
    monkeypatch.setattr(decoder, "spans_of", lambda _replacing, num_rows: spans(Segments(), num_rows))
    base = load_base(folder, device=CPU, dtype=torch.float32, backend=CudaBackend(CPU, torch.float32))
    assert not isinstance(base.model.model.layers[0], CudaDecoder)
    assert base.model.model.norm.weight is not None


def logprobs(base: BaseModel, folder: Path) -> Tensor:
    """Of prompts of several lengths in one step: the base alone, each adapter, a sum of two, a mixture."""
    uses: list[tuple[AdapterUse, ...]] = [()]
    for name in ADAPTERS:
        files = folder / name / CONFIG_FILE, folder / name / WEIGHTS_FILE
        weights = base.prepared(load_weights(f"sha256:{name}", *files, base.layers, base.dtype, CPU))
        uses.append((AdapterUse(weights, 1.0, weights.digest),))
    uses.append((uses[1][0], replace(uses[3][0], scale=-0.5)))
    members = uses[1][0], uses[3][0]
    router = Router(tuple(Prototypes(use.weights, base.paths) for use in members), 1, 1.0)
    uses.append(tuple(replace(use, route=Route(router, number)) for number, use in enumerate(members)))
    pool, rows = BlockPool(64, 16), []
    for number, adapters in enumerate(uses):
        prompt = tuple((7 * number + at) % 250 for at in range(3 + 6 * number))
        request = Request("row", prompt, SamplingParams(max_tokens=1), lambda _event: None, adapters=adapters)
        sequence = Sequence(request, 0)
        pool.grow(sequence.block_table, sequence.num_tokens)
        rows.append(rows_of(sequence, 0, sequence.num_tokens))
    return base.runner(64, 16).logits(Batch(tuple(rows))).float().log_softmax(-1)
