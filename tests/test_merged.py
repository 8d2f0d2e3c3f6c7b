"""An adapter merged into weights of its own answers as it does unmerged, beside both the base and itself."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tiny
from swaplora_adapters.artifact.merged import merged
from swaplora_adapters.artifact.served import AdapterWeights
from swaplora_server.engine.base_model import BaseModel, load_base
from swaplora_server.engine.kernels import pick_kernels, torch_kernels
from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.request import AdapterUse, Request, SamplingParams, Sequence
from swaplora_server.engine.scheduler import Batch, ScheduledRows
from test_deterministic import CACHE, SHAPE, embedding_adapter, random_adapter, replacing_adapter, scaled_adapter

CPU = torch.device("cpu")
BASES = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True, **SHAPE},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False, **SHAPE},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
}
KINDS = {
    "lora": lambda base: random_adapter(base, 5, 1),
    "scaled": lambda base: scaled_adapter(base, 5, 2),
    "replacing": lambda base: replacing_adapter(base, 3),
    "embedding": lambda base: embedding_adapter(base, 4),
}


@pytest.fixture(scope="module", params=[(name, native) for name in BASES for native in (True, False)])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    name, is_native = request.param
    folder = tiny.save_tiny_base(tmp_path_factory.mktemp("base"), BASES[name])
    kernels = pick_kernels(CPU, torch.float32, CACHE, lambda _message: None) if is_native else torch_kernels(CPU)
    return load_base(folder, device=CPU, dtype=torch.float32, kernels=kernels)


def answers(base: BaseModel, adapters: list[AdapterWeights | None]) -> list[Tensor]:
    """The last logits of one prompt, for each of `adapters`, all in one step."""
    pool, rows = BlockPool(64, 16), []
    for weights in adapters:
        uses = () if weights is None else (AdapterUse(weights, 1.0, weights.digest),)
        request = Request("r", tuple(range(3, 40)), SamplingParams(max_tokens=1), lambda _event: None, adapters=uses)
        sequence = Sequence(request, 0)
        pool.grow(sequence.block_table, sequence.num_tokens)
        rows.append(ScheduledRows(sequence, 0, sequence.num_tokens))
    return list(base.runner(64, 16).logits(Batch(tuple(rows))))


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_answers_as_it_does_unmerged(base: BaseModel, kind: str) -> None:
    adapter = KINDS[kind](base)
    own_weights = replace(merged(adapter, base.layers), digest="sha256:merged")
    alone, unmerged, own, after = answers(base, [None, adapter, own_weights, None])
    assert (unmerged - alone).abs().max() > 0.5, "the adapter moves the output"
    assert (own - unmerged).abs().max() <= 1e-4 * unmerged.abs().max()
    for later in (after, answers(base, [None])[0]):
        torch.testing.assert_close(later, alone, atol=1e-5, rtol=1e-5)  # the resident base was not written


def test_a_merged_weight_is_rounded_only_where_the_base_is(base: BaseModel) -> None:
    path = next(iter(base.layers.linears))
    own = merged(random_adapter(base, 5, 1), base.layers)
    exact = base.layers.read(f"{path}.weight")
    assert not torch.equal(exact.bfloat16().float(), exact)
    module = own.replaced[path]
    x = torch.randn(1, 3, base.layers.linears[path].in_features)
    factors = random_adapter(base, 5, 1).modules[path]
    bias = module.bias if isinstance(module.bias, Tensor) else 0
    expected = x @ (exact + factors.lora_B.float() @ factors.lora_A.float()).t() + bias
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)
