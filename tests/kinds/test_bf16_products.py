"""Products of bfloat16 on a CPU are as near to PEFT in float32 as PEFT in bfloat16 is, adapters and the base mixed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from oracle import Oracle
from repository import KERNEL_CACHE
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.weights.load import load_weights
from swaplora_server.base.base_model import BaseModel, load_base
from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.request import AdapterUse, Request, SamplingParams, Sequence
from swaplora_server.engine.scheduling.batch import Batch, rows_of
from swaplora_server.kernels.pick import pick_backend

CPU = torch.device("cpu")
TOKENS = [(11 * position + 5) % 250 for position in range(60)]
RANKS = (1, 4, 16, 64)
CONFIGS = [tiny.LLAMA, {**tiny.LLAMA, "model_type": "olmo2"}]


@pytest.mark.parametrize("config", CONFIGS, ids=["layers fused", "layer by layer"])
def test_it_errs_no_more_than_peft_does_in_bfloat16(config: dict[str, object], tmp_path: Path) -> None:
    folder = tiny.save_tiny_base(tmp_path / "base", config)
    made = [tiny.save_adapter(tmp_path / f"rank{rank}", folder, seed=rank, rank=rank) for rank in RANKS]
    backend = pick_backend(CPU, torch.bfloat16, KERNEL_CACHE, lambda _message: None)
    base = load_base(folder, device=CPU, dtype=torch.float32, backend=backend)
    ours = logprobs(base, [None, *(load(base, adapter) for adapter in made)])
    exact, half = (
        torch.stack([Oracle(folder, adapter, dtype).logprobs(TOKENS)[-1] for adapter in (None, *made)])
        for dtype in (torch.float32, torch.bfloat16)
    )
    error, noise = ((each - exact).square().mean().sqrt() for each in (ours, half))
    assert 0 < error <= 1.5 * noise


def load(base: BaseModel, folder: Path) -> AdapterUse:
    files = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    weights = base.prepared(load_weights(f"sha256:{folder.name}", *files, base.layers, base.dtype, base.device))
    return AdapterUse(weights, 1.0, weights.digest)


def logprobs(base: BaseModel, uses: list[AdapterUse | None]) -> Tensor:
    """[len(uses), vocab_size] of the token after TOKENS, all of them in one step."""
    pool, rows = BlockPool(256, 16), []
    for use in uses:
        adapters = () if use is None else (use,)
        request = Request("row", tuple(TOKENS), SamplingParams(max_tokens=1), lambda _event: None, adapters=adapters)
        sequence = Sequence(request, 0)
        pool.grow(sequence.block_table, sequence.num_tokens)
        rows.append(rows_of(sequence, 0, sequence.num_tokens))
    return base.runner(256, 16).logits(Batch(tuple(rows))).log_softmax(-1)
