"""What an encoder's folder says of its vectors, which adapters fit it, and which bases are refused by their name."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel

import tiny
from hidden_oracle import HiddenOracle
from scheduler_harness import run_step, submit
from serving import BASE, Running, serving, settings
from swaplora_server.base.encoder.encoder_base import EncoderBase, is_encoder, load_encoder
from swaplora_server.base.encoder.sentence_config import read_sentence_config
from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.lora.attach import attach
from swaplora_server.engine.pooling.kinds import Pooling, PoolingKind
from swaplora_server.engine.scheduling.scheduler import Scheduler
from swaplora_server.kernels.backend import LayerAttention
from swaplora_server.kernels.pick import torch_backend
from swaplora_server.kernels.torch.whole_attention import WholeInputs
from swaplora_server.service.service import Service
from tiny_encoders import EncoderOracle, Vector, save_encoder, save_feature_adapter, save_sentence_config

CPU = torch.device("cpu")
IDS = [5, 40, 41, 200, 6]


def load(folder: Path) -> EncoderBase:
    return load_encoder(folder, device=CPU, dtype=torch.float32, backend=torch_backend(CPU))


def embed(server: Running, model: str, **fields: Any) -> Vector:
    answer = server.client.post("/v1/embeddings", json={"model": model, "input": IDS, **fields})
    assert answer.status_code == 200, answer.text
    return np.array(answer.json()["data"][0]["embedding"], np.float32)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("bert"), "bert")


def test_a_sentence_transformers_folder_says_how_vectors_are_made(tmp_path: Path) -> None:
    base = save_encoder(tmp_path / "base", "bert")
    save_sentence_config(base, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, 20, "Pooling")
    adapter = save_feature_adapter(tmp_path / "adapter", base, 1)
    merged = save_feature_adapter(tmp_path / "merged", base, 2)
    first = {name: EncoderOracle(base, tmp_path / name).states(IDS)[0] for name in ("adapter", "merged")}
    tiny.edit_config(merged, materialise=True)
    with serving(settings(base, tmp_path / "data", kv_cache_bytes=None)) as running:
        assert running.service.max_model_len == 20
        for folder in (adapter, merged):
            assert running.put(folder.name, folder).status_code == 201
            assert np.abs(embed(running, folder.name) - first[folder.name]).max() <= 1e-4
        of_length_1 = embed(running, BASE, normalize=True)
        assert np.allclose(of_length_1, embed(running, BASE) / np.linalg.norm(embed(running, BASE)), atol=1e-6)
        terms = [{"name": "adapter", "scale": 1.0}]
        assert np.array_equal(embed(running, BASE, adapters=terms), embed(running, "adapter"))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, PoolingKind.MEAN),
        ({"pooling_mode_max_tokens": True, "word_embedding_dimension": 32}, PoolingKind.MAX),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, PoolingKind.MEAN_SQRT),
        ({"pooling_mode_weightedmean_tokens": True}, PoolingKind.WEIGHTED),
        ({"pooling_mode_lasttoken": True}, PoolingKind.LAST),
        ({"pooling_mode": "cls"}, PoolingKind.CLS),
        ({"pooling_mode": "mean", "embedding_dimension": 32}, PoolingKind.MEAN),
        ({}, PoolingKind.MEAN),
    ],
)
def test_every_way_of_pooling_is_read_by_its_name(tmp_path: Path, config: dict[str, Any], kind: PoolingKind) -> None:
    save_sentence_config(tmp_path, config, None, "Pooling", "Normalize")
    found = read_sentence_config(tmp_path)
    assert (found.pooling, found.max_tokens) == (Pooling(kind, normalises=True), None)


def test_vectors_of_another_folder_are_the_mean_of_length_1(tmp_path: Path) -> None:
    assert read_sentence_config(tmp_path).pooling == Pooling(PoolingKind.MEAN, normalises=True)


@pytest.mark.parametrize(
    ("config", "modules", "named"),
    [
        ({}, ("Pooling", "Dense", "Normalize"), "Dense"),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, ("Pooling",), "cls_token and max_tokens"),
        ({"pooling_mode": "secret"}, ("Pooling",), "secret"),
    ],
)
def test_what_is_not_served_is_refused_at_start_by_its_name(
    tmp_path: Path, config: dict[str, Any], modules: tuple[str, ...], named: str
) -> None:
    save_sentence_config(tmp_path, config, None, *modules)
    with pytest.raises(UnsupportedModelError, match=named):
        read_sentence_config(tmp_path)


@given(st.integers(1, 40), st.integers(0, 10**6))
def test_pooling_is_what_its_name_says(length: int, seed: int) -> None:
    states = torch.randn(length, 8, generator=torch.Generator().manual_seed(seed))
    rows = states.double().numpy()
    weights = np.arange(1, length + 1)[:, None]
    expected = {
        PoolingKind.CLS: rows[0],
        PoolingKind.LAST: rows[-1],
        PoolingKind.MEAN: rows.mean(0),
        PoolingKind.MEAN_SQRT: rows.sum(0) / length**0.5,
        PoolingKind.WEIGHTED: (rows * weights).sum(0) / weights.sum(),
        PoolingKind.MAX: rows.max(0),
    }
    assert expected.keys() == set(PoolingKind)
    for kind, right in expected.items():
        assert np.abs(Pooling(kind).vector(states).numpy() - right).max() < 1e-5, kind


def without(folder: Path, *gone: str, **more: torch.Tensor) -> Path:
    """The base's files without some tensors, and with others."""
    path = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.endswith(gone)}
    save_file({**tensors, **more}, path, {"format": "pt"})
    return folder


def test_a_head_that_adapters_bring_is_not_told_as_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    folder = save_encoder(tmp_path / "base", "bert")
    load(folder)
    assert "classifier" not in caplog.text
    with pytest.raises(RuntimeError):  # of another shape than the config has it
        load(without(folder, "word_embeddings.weight", **{"embeddings.word_embeddings.weight": torch.zeros(3, 32)}))
    assert "MISMATCH" in caplog.text


@pytest.mark.parametrize("architecture", ["bert", "deberta-v2", "modernbert"])
def test_tensors_of_the_encoder_itself_that_are_missing_are_named(architecture: str, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path, architecture)
    names = sorted(load_file(folder / "model.safetensors"))
    gone = [name for name in names if name.startswith(("encoder.layer.1", "layers.1"))]
    with pytest.raises(UnsupportedModelError) as refused:
        load(without(folder, *gone))
    assert all(name in str(refused.value) for name in gone[:3])
    assert f"and {len(gone) - 3} more: this is no whole {architecture}" in str(refused.value)


def test_tensors_that_nothing_reads_are_told(tmp_path: Path) -> None:
    folder = without(save_encoder(tmp_path, "bert"), **{"encoder.layer.7.output.dense.bias": torch.zeros(3)})
    with structlog.testing.capture_logs() as told:
        load(folder)
    assert [line["tensors"] for line in told if "nothing reads" in line["event"]] == [
        "encoder.layer.7.output.dense.bias"
    ]


def test_which_bases_are_encoders() -> None:
    def kind(model_type: str, **fields: Any) -> bool:
        return is_encoder(CONFIG_MAPPING[model_type](**fields))

    assert all(map(kind, ("bert", "roberta", "xlm-roberta", "distilbert", "modernbert", "deberta-v2")))
    assert not any(map(kind, ("llama", "qwen2", "gpt2", "bart", "t5")))
    assert not kind("bert", is_decoder=True)


@pytest.mark.parametrize(
    "fields",
    [{"kv_cache_bytes": 1 << 20}, {"gpu_memory_fraction": 0.5}, {"cuda_graphs": False}],
    ids=lambda f: next(iter(f)),
)
def test_a_setting_that_says_nothing_of_an_encoder_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    (name,) = fields
    base = save_encoder(tmp_path / "base", "bert")
    service = Service(settings(base, tmp_path / "data", **{"kv_cache_bytes": None, **fields}))
    with pytest.raises(UnsupportedModelError, match=f"--{name.replace('_', '-')} is for bases that generate"):
        service.start(lambda _message: None)


def test_a_model_that_keeps_its_attention_to_itself_is_refused_by_its_name(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    AutoModel.from_config(CONFIG_MAPPING["mpnet"](vocab_size=259, **shape)).save_pretrained(tmp_path)
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="mpnet computes its attention in its own code"):
        load(tmp_path)


def test_a_window_that_is_off_by_one_is_found_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_encoder(tmp_path, "modernbert")
    attend = WholeInputs.attend

    def wider(self: WholeInputs, layer: LayerAttention, *rows: Any) -> Any:
        window = layer.window and layer.window + 1
        return attend(self, LayerAttention(layer.layer_idx, layer.scaling, window=window), *rows)

    monkeypatch.setattr(WholeInputs, "attend", wider)
    with pytest.raises(UnsupportedModelError, match="computes something else when inputs are packed"):
        load(folder)


def test_positions_that_are_not_the_models_own_are_found_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_encoder(tmp_path, "roberta")
    monkeypatch.setattr("swaplora_server.engine.pooling.encoder_runner.padding_id_of", lambda _model: None)
    with pytest.raises(UnsupportedModelError, match="computes something else when inputs are packed"):
        load(folder)


def test_a_layer_that_adapters_do_not_reach_is_found_at_start(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetting(rooted: PreTrainedModel, **given: Any) -> Any:
        wrapped = attach(rooted, **given)
        last = next(module for path, module in wrapped.items() if path.endswith("layer.1.output.dense"))
        monkeypatch.setattr(last, "forward", last.base.forward)
        return wrapped

    monkeypatch.setattr("swaplora_server.base.encoder.encoder_base.attach", forgetting)
    with pytest.raises(UnsupportedModelError, match="computes something else with adapters"):
        load(bert)


def test_an_input_is_computed_whole_and_shorter_ones_fill_the_step() -> None:
    scheduler = Scheduler(
        BlockPool(9, 10),
        max_batch_tokens=10,
        max_num_seqs=4,
        max_step_ranks=9,
        prefix_cache=False,
        takes_whole=True,
    )
    for length in (6, 7, 3, 10, 4):
        submit(scheduler, range(length), max_tokens=0, wants_hidden=True)
    steps = []
    while scheduler.has_work:
        steps.append([(rows.start, rows.stop) for rows in run_step(scheduler).rows])
    assert steps == [[(0, 6), (0, 3)], [(0, 7)], [(0, 10)], [(0, 4)]]


def test_adapters_of_models_without_a_head_fit_by_lists_and_patterns(
    base: Path, bert: Path, tmp_path: Path, server: Running
) -> None:
    """On a decoder too, whose last token is read."""
    pattern = r"layers\.\d+\.(self_attn\.[qv]_proj|mlp\.up_proj)"
    for name, targets in {"listed": ["q_proj", "layers.1.mlp.up_proj"], "pattern": pattern}.items():
        adapter = save_feature_adapter(tmp_path / name, base, 3, target_modules=targets)
        names = json.loads((adapter / "adapter_config.json").read_text())
        assert names["task_type"] == "FEATURE_EXTRACTION"
        answer = server.put(name, adapter)
        assert answer.status_code == 201, answer.text
        last = EncoderOracle(base, adapter).states(IDS)[-1]
        assert np.abs(embed(server, name) - last / np.linalg.norm(last)).max() <= 1e-4
        assert np.abs(embed(server, name) - HiddenOracle(base).embedding(IDS)).max() > 0.01


def test_an_adapter_that_fits_no_layer_is_refused(bert: Path, tmp_path: Path, server: Running) -> None:
    adapter = save_feature_adapter(tmp_path / "other", bert, 3)
    answer = server.put("other", adapter)
    assert answer.status_code == 422
    assert "encoder.layer.0.attention.self.query" in answer.json()["error"]["message"]
