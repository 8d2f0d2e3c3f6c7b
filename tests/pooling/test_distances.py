"""DeBERTa's kinds: packed inputs of base and adapters, whose scores of distances each adapter changes, equal PEFT's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

import tiny
from swaplora_adapters.errors import InvalidAdapterError
from swaplora_server.base.encoder.encoder_base import load_encoder
from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.engine.pooling import deberta_like, disentangled
from swaplora_server.engine.pooling.kinds import Pooling, PoolingKind
from swaplora_server.engine.request import AdapterUse
from swaplora_server.kernels.pick import torch_backend
from tiny_encoders import ARCHITECTURES, EncoderOracle, save_encoder, save_feature_adapter
from tiny_steps import CPU, Asked, loaded, read, use_of

TOLERANCE = 1e-4
MEAN = Pooling(PoolingKind.MEAN)
LENGTHS = (1, 2, 100, 17, 33, 5, 64)
V2: dict[str, dict[str, Any]] = {
    "linears of their own": {"share_att_key": False},
    "keys of distances alone": {"pos_att_type": ["c2p"], "share_att_key": False},
    "queries of distances alone": {"pos_att_type": ["p2c"]},
    "no distances": {"relative_attention": False},
    "positions and segments": {"position_biased_input": True, "type_vocab_size": 2},
    "narrow embeddings": {"embedding_size": 16},
    "a convolution": {"conv_kernel_size": 3, "conv_act": "gelu"},
    "no buckets, and fewer distances than positions": {"position_buckets": -1, "max_relative_positions": 20},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "queries": {"target_modules": ["query_proj"]},
    "linears": {},
    "dora": {"use_dora": True},
    "saved": {"target_modules": ["value_proj"], "modules_to_save": ["layer.0.attention.self.query_proj"]},
}


def inputs(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 256, length).tolist() for length in lengths]


def check_against_peft(folder: Path, adapters: dict[str, Path]) -> None:
    """Every adapter, the base and a sum over several inputs in one step, then each alone."""
    base = loaded(folder)
    uses: dict[str, tuple[AdapterUse, ...]] = {name: use_of(base, adapter) for name, adapter in adapters.items()}
    named = [("", ()), *uses.items()]
    first, last = named[1][1][0], named[-1][1][0]
    named.append(("sum", (AdapterUse(first.weights, 0.5, first.digest), AdapterUse(last.weights, -1.0, last.digest))))
    asked: list[Asked] = []
    names: list[str] = []
    for number, ids in enumerate(inputs() * 2):
        name, own = named[number % len(named)]
        names.append(name)
        asked.append((ids, own, MEAN))
    oracles = {name: EncoderOracle(folder, adapters.get(name)) for name in ("", *adapters)}
    runner = base.input_runner()
    for name, one, found in zip(names, asked, read(runner, asked), strict=True):
        assert np.array_equal(read(runner, [one])[0], found), name
        if name in oracles:
            assert np.abs(found - oracles[name].states(one[0]).mean(0)).max() <= TOLERANCE, name


@pytest.mark.parametrize("kind", V2)
def test_every_form_of_the_second_version_is_stock_transformers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "deberta-v2", {**ARCHITECTURES["deberta-v2"], **V2[kind]})
    folder = save_encoder(tmp_path / "base", "deberta-v2")
    check_against_peft(folder, {"linears": save_feature_adapter(tmp_path / "linears", folder, 1)})


def test_every_kind_of_adapter_has_distances_of_its_own(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "base", "deberta-v2")
    adapters = {
        name: save_feature_adapter(tmp_path / name, folder, seed, **fields)
        for seed, (name, fields) in enumerate(ADAPTERS.items())
    }
    check_against_peft(folder, adapters)


def test_the_sum_of_two_is_that_of_their_weights(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "base", "deberta-v2")
    base = loaded(folder)
    one, other = (save_feature_adapter(tmp_path / str(seed), folder, seed) for seed in (1, 2))
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(folder, dtype=torch.float32), str(one), "one")
    model.load_adapter(str(other), "other")
    model.add_weighted_adapter(["one", "other"], [0.5, -1.0], "sum", "cat")
    model.set_adapter("sum")
    uses = tuple(
        AdapterUse(use.weights, scale, use.digest)
        for use, scale in zip((*use_of(base, one), *use_of(base, other)), (0.5, -1.0), strict=True)
    )
    (ids,) = inputs((40,))
    (found,) = read(base.input_runner(), [(ids, uses, MEAN)])
    with torch.no_grad():
        right = model.eval()(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
    assert np.abs(found - right).max() <= TOLERANCE


def test_without_native_kernels_it_is_the_same(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "base", "deberta-v2")
    base = load_encoder(folder, device=CPU, dtype=torch.float32, backend=torch_backend(CPU))
    use = use_of(base, save_feature_adapter(tmp_path / "adapter", folder, 1))
    oracles = EncoderOracle(folder), EncoderOracle(folder, tmp_path / "adapter")
    ids = inputs((90, 7))
    found = read(base.input_runner(), [(one, own, MEAN) for one in ids for own in ((), use)])
    right = [oracle.states(one).mean(0) for one in ids for oracle in oracles]
    assert max(np.abs(one - other).max() for one, other in zip(found, right, strict=True)) <= TOLERANCE


def distances_of_the_base_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(disentangled.StepDistances, "through", lambda self, _linear, of_base: of_base[self.table_rows])


def distances_the_wrong_way_round(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(disentangled, "InputRows", lambda start, stop, *rows: (start, stop, *reversed(rows)))


def the_last_bucket_left_out(patch: pytest.MonkeyPatch) -> None:
    of_rows = deberta_like.rows_of_distances
    patch.setattr(disentangled, "rows_of_distances", lambda *given: of_rows(*given).clamp(2, 29))


def adapters_of_another_input(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(disentangled, "takewhile", lambda _is_own, segments: list(segments)[-1:])


@pytest.mark.parametrize(
    ("plant", "case"),
    [
        (distances_of_the_base_alone, "with adapters"),
        (distances_the_wrong_way_round, "when inputs are packed"),
        (the_last_bucket_left_out, "when inputs are packed"),
        (adapters_of_another_input, "with adapters"),
    ],
)
def test_a_fault_in_distances_is_found_at_start(
    plant: Callable[[pytest.MonkeyPatch], None], case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_encoder(tmp_path, "deberta-v2")
    plant(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=f"computes something else {case}"):
        loaded(folder)


@pytest.mark.parametrize("architecture", ["deberta", "deberta-v2"])
def test_what_is_kept_of_distances_counts_among_the_bases_weights(architecture: str, tmp_path: Path) -> None:
    base = loaded(save_encoder(tmp_path, architecture))
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*base.model.parameters(), *base.model.buffers())}
    attention = [layer.attention.self.forward for layer in base.model.encoder.layer]
    table = attention[0].table
    kept = [
        *([] if table.data_ptr() in held else [table]),
        *(rows for own in attention for rows in own.of_base.values()),
    ]
    assert len(kept) == 4 + (architecture == "deberta-v2"), "its norm makes another table"
    assert base.weight_bytes == sum(held.values()) + sum(tensor.nbytes for tensor in kept)


def test_heads_that_talk_to_each_other_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "deberta", {**ARCHITECTURES["deberta"], "talking_head": True})
    with pytest.raises(
        UnsupportedModelError, match="deberta cannot be packed: the model's attention asks for talking_head"
    ):
        loaded(save_encoder(tmp_path, "deberta"))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is not supported with 'deberta.encoder.layer.0"),
        ({"modules_to_save": ["rel_embeddings"]}, "modules_to_save names 'rel_embeddings'"),
        ({"modules_to_save": ["encoder.LayerNorm"]}, "modules_to_save names 'encoder.LayerNorm'"),
    ],
)
def test_what_changes_more_than_rows_of_inputs_is_refused_by_name(
    fields: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = save_encoder(tmp_path / "base", "deberta-v2")
    adapter = save_feature_adapter(tmp_path / "adapter", folder, 1, target_modules=["query_proj"])
    tiny.edit_config(adapter, **fields)
    with pytest.raises(InvalidAdapterError) as caught:
        use_of(loaded(folder), adapter)
    assert named in str(caught.value)


def test_an_activated_adapter_of_values_alone_is_served(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "base", "deberta-v2")
    adapter = save_feature_adapter(tmp_path / "adapter", folder, 1, target_modules=["value_proj"])
    tiny.edit_config(adapter, alora_invocation_tokens=[5])
    (use,) = use_of(loaded(folder), adapter)
    assert use.weights.invocation == (5,)
