"""Mixtures in models of other kinds, and in the embedded base, against PEFT's Arrow."""

from pathlib import Path

import pytest
import torch

import tiny
from architectures import ARCHITECTURES
from oracle import ArrowOracle, Oracle
from repository import KERNEL_CACHE
from swaplora_adapters.weights.load import load_weights
from swaplora_adapters.weights.router import Prototypes, Route, Router
from swaplora_server.base.base_model import BaseModel, load_base
from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.request import AdapterUse, Request, SamplingParams, Sequence
from swaplora_server.engine.scheduling.batch import Batch, rows_of
from swaplora_server.kernels.backend import Backend
from swaplora_server.kernels.pick import pick_backend, torch_backend

CPU = torch.device("cpu")
TOLERANCE = 1e-4
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "opt": ["q_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "llama": [*tiny.ALL_LINEAR, "lm_head"],
}
PROMPT = [(7 * number + 11) % tiny.VOCAB_SIZE for number in range(30)]
Uses = tuple[AdapterUse, ...]


def uses_of(base: BaseModel, folders: list[Path], top_k: int, temperature: float) -> Uses:
    weights = [
        base.prepared(
            load_weights(
                f"sha256:{folder.name}",
                folder / "adapter_config.json",
                folder / "adapter_model.safetensors",
                base.layers,
                base.dtype,
                CPU,
                base.backend.placement,
            )
        )
        for folder in folders
    ]
    router = Router(tuple(Prototypes(each, base.paths) for each in weights), top_k, temperature)
    return tuple(AdapterUse(each, 1.0, each.digest, Route(router, number)) for number, each in enumerate(weights))


def logprobs(base: BaseModel, all_uses: list[Uses]) -> list[torch.Tensor]:
    """Of the prompt by each of these, in one step: [num_tokens - 1, vocab_size]."""
    pool, runner = BlockPool(64, 16), base.runner(64, 16)
    rows = []
    for number, uses in enumerate(all_uses):
        params = SamplingParams(max_tokens=1, num_prompt_logprobs=0)
        request = Request(str(number), tuple(PROMPT), params, emit=lambda _event: None, adapters=uses)
        sequence = Sequence(request, 0)
        pool.grow(sequence.block_table, len(PROMPT))
        rows.append(rows_of(sequence, 0, len(PROMPT)))
    order = sorted(range(len(rows)), key=lambda number: (rows[number].sequence.request.adapter_key, number))
    logits = runner.logits(Batch(tuple(rows[number] for number in order))).log_softmax(-1)
    found = dict(zip(order, torch.split(logits, len(PROMPT)), strict=True))
    return [found[number] for number in range(len(rows))]


def backends() -> dict[str, Backend]:
    return {
        "cpu": pick_backend(CPU, torch.float32, KERNEL_CACHE, lambda _message: None),
        "torch": torch_backend(CPU),
    }


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *((kind, "cpu") for kind in ("llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "opt", "phi3", "mixtral")),
        ("llama", "torch"),
        ("gpt2", "torch"),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # PEFT's, for an adapted head
def test_an_architecture_is_mixed_as_peft_does(kind: str, form: str, tmp_path: Path) -> None:
    fields = ARCHITECTURES[kind] | {"model_type": kind, "tie_word_embeddings": False}
    folder = tiny.save_tiny_base(tmp_path / "base", fields, seed=3)
    members = [
        tiny.save_adapter(
            tmp_path / f"member{seed}", folder, seed=seed, rank=5, target_modules=TARGETS.get(kind, tiny.ALL_LINEAR),
            fan_in_fan_out=kind == "gpt2",
        )
        for seed in (1, 2, 3)
    ]  # fmt: skip
    base = load_base(folder, device=CPU, dtype=torch.float32, backend=backends()[form])
    mixed, few = uses_of(base, members, 2, 0.5), uses_of(base, members[1:], 1, 1.0)
    alone = (AdapterUse(mixed[0].weights, 1.0, mixed[0].digest),)
    together = logprobs(base, [mixed, (), few, alone])
    oracles = [
        ArrowOracle(folder, members, 2, 0.5),
        Oracle(folder),
        ArrowOracle(folder, members[1:], 1),
        Oracle(folder, members[0]),
    ]
    expected = [oracle.logprobs(PROMPT) for oracle in oracles]
    for found, right in zip(together, expected, strict=True):
        assert (found - right).abs().max() <= TOLERANCE
    assert (together[0] - expected[3]).abs().max() > 100 * TOLERANCE, "the mixture must differ from a member"
    if form == "cpu" and kind != "mixtral":  # whose experts multiply all of their rows at once, the base's too
        for found, uses in zip(together, [mixed, (), few, alone], strict=True):
            assert torch.equal(logprobs(base, [uses])[0], found)
