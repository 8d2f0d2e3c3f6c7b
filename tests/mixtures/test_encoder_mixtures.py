"""Mixtures in encoders, DeBERTa's distances among them, against PEFT's Arrow, in one step with all else and alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import ArrowConfig, create_arrow_model
from transformers import AutoModel

from swaplora_adapters.weights.router import Prototypes, Route, Router
from swaplora_server.engine.pooling.kinds import Pooling, PoolingKind
from swaplora_server.engine.request import AdapterUse
from tiny_encoders import EncoderOracle, save_encoder, save_feature_adapter
from tiny_steps import Asked, loaded, read, use_of

TOLERANCE = 1e-4
MEAN = Pooling(PoolingKind.MEAN)
Uses = tuple[AdapterUse, ...]


class ArrowEncoderOracle(EncoderOracle):
    """Several adapters of an encoder mixed by PEFT's Arrow."""

    def __init__(self, base: Path, adapters: list[Path], top_k: int, temperature: float) -> None:
        model = AutoModel.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
        config = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
        self._model = create_arrow_model(model, [str(folder) for folder in adapters], config).eval()
        model.pooler = None  # by its name alone the router is on its `dense` too, where no member is


@pytest.mark.parametrize("kind", ["bert", "deberta", "deberta-v2"])
def test_vectors_of_an_encoder_by_a_mixture_are_pefts_in_any_company(kind: str, tmp_path: Path) -> None:
    """All share their members, so that nothing but the way to choose tells the sets of adapters apart."""
    folder = save_encoder(tmp_path / "base", kind)
    members = [save_feature_adapter(tmp_path / str(seed), folder, seed) for seed in (1, 2, 3)]
    base = loaded(folder)
    uses = tuple(use for member in members for use in use_of(base, member))
    prototypes = tuple(Prototypes(use.weights, base.paths) for use in uses)

    def mixed(top_k: int, temperature: float) -> Uses:
        router = Router(prototypes, top_k, temperature)
        places = enumerate(uses)
        return tuple(AdapterUse(use.weights, 1.0, use.digest, Route(router, number)) for number, use in places)

    named: list[tuple[Uses, EncoderOracle | None]] = [
        (mixed(1, 1.0), ArrowEncoderOracle(folder, members, 1, 1.0)),
        (uses, None),  # their sum
        (mixed(2, 0.3), ArrowEncoderOracle(folder, members, 2, 0.3)),
        ((), EncoderOracle(folder)),
        (uses[:1], EncoderOracle(folder, members[0])),
    ]
    rng = np.random.default_rng(0)
    inputs = [rng.integers(2, 256, length).tolist() for length in (40, 40, 33, 2, 17, 100, 1, 64, 5, 33)]
    asked: list[Asked] = [(ids, named[number % 5][0], MEAN) for number, ids in enumerate(inputs)]
    runner = base.input_runner()
    for number, (one, found) in enumerate(zip(asked, read(runner, asked), strict=True)):
        assert np.array_equal(read(runner, [one])[0], found), number
        oracle = named[number % 5][1]
        if oracle is not None:
            assert np.abs(found - oracle.states(one[0]).mean(0)).max() <= TOLERANCE, number
