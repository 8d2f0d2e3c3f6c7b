"""A row's logits are the same, bit for bit, alone and in any batch, however its prompt was cut."""

from collections.abc import Callable
from functools import cache

import pytest
import torch

import tiny
from mixed_batch import (
    CACHE,
    NUM_DECODED,
    SHAPE,
    MixedBatch,
    embedding_adapter,
    random_adapter,
    replacing_adapter,
    scaled_adapter,
)
from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.base.base_model import BaseModel, load_base
from swaplora_server.kernels.pick import pick_backend

CPU = torch.device("cpu")
# no width is a whole number of vectors, of which torch would compute the rest with other code
ODD = {**SHAPE, "hidden_size": 76, "intermediate_size": 108, "head_dim": 12}
BASES = {
    "llama": {"model_type": "llama", **SHAPE},
    "qwen3": {"model_type": "qwen3", **SHAPE},
    "mistral": {"model_type": "mistral", "sliding_window": 9, **SHAPE},
    "olmo2": {"model_type": "olmo2", **SHAPE},
    "gemma2": {"model_type": "gemma2", "sliding_window": 9, **SHAPE},
    "starcoder2": {"model_type": "starcoder2", **SHAPE},
    "gpt_neox": {"model_type": "gpt_neox", **SHAPE},
    "llama of odd widths": {"model_type": "llama", **ODD},
    "gemma2 of odd widths": {"model_type": "gemma2", "sliding_window": 9, **ODD},
    "smollm3 of odd widths": {"model_type": "smollm3", "no_rope_layers": [1, 0], **ODD},
}
SEED = 1
COUNTS = (1, 2, 7, 8, 16, 31, 32, 33)
FEW = (2, 7, 33)
# how many rows a step has is the kernels' matter, which are the same for all bases of a width and dtype
NUM_SEQUENCES = {name: COUNTS if name.startswith("llama") else FEW for name in BASES}


@pytest.fixture(scope="module")
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    name, dtype = request.param
    folder = tiny.save_tiny_base(tmp_path_factory.mktemp("base"), BASES[name])
    backend = pick_backend(CPU, dtype, CACHE, lambda _message: None)
    return load_base(folder, device=CPU, dtype=torch.float32, backend=backend)


@pytest.fixture(scope="module")
def adapters(base: BaseModel) -> list[AdapterWeights]:
    plain = [random_adapter(base, rank, seed) for seed, rank in enumerate([1, 4, 7, 16, 33, 64])]
    others = [
        scaled_adapter(base, 8, 7),
        replacing_adapter(base, 8),
        replacing_adapter(base, 9),
        embedding_adapter(base, 10),
    ]
    return plain + others


@pytest.fixture(scope="module")
def alone(base: BaseModel, adapters: list[AdapterWeights]) -> Callable[[int], list[torch.Tensor]]:
    """The logits of a sequence, whoever it will be with."""
    return cache(MixedBatch(base, adapters, max(COUNTS), SEED).alone)


@pytest.mark.parametrize(
    ("base", "count"),
    [
        ((name, dtype), count)
        for dtype in (torch.float32, torch.bfloat16)
        for name, counts in NUM_SEQUENCES.items()
        for count in counts
    ],
    indirect=["base"],
)
def test_logits_do_not_depend_on_the_rest_of_the_batch(
    base: BaseModel, adapters: list[AdapterWeights], alone: Callable[[int], list[torch.Tensor]], count: int
) -> None:
    together = MixedBatch(base, adapters, count, SEED).together()
    for number in range(count):
        assert len(alone(number)) == len(together[number]) == NUM_DECODED + 1
        for position, (mine, theirs) in enumerate(zip(alone(number), together[number], strict=True)):
            assert torch.equal(mine, theirs), f"sequence {number}, output {position}"
