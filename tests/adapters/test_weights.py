"""Factors as served: what PEFT computes from the same files, and nothing at all from files that do not fit."""

import bisect
import itertools
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import tiny
from adapter_files import CONFIG, LAYERS, SHAPES, config_bytes, factors, write_adapter
from swaplora_adapters import intake
from swaplora_adapters.config.parse import parse_spec
from swaplora_adapters.config.patterns import MAX_WORK
from swaplora_adapters.config.spec import AdapterSpec
from swaplora_adapters.errors import InvalidAdapterError
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.files.tensorfile import Header, read_header
from swaplora_adapters.fit.base import BaseLayers, LayerShapes, LinearShape
from swaplora_adapters.fit.fit import Layout, fitted
from swaplora_adapters.weights import load
from swaplora_adapters.weights.load import Fits, Survey, check_fit, load_weights, survey_values
from swaplora_adapters.weights.served import AdapterWeights

CPU = torch.device("cpu")
PREFIX = "base_model.model.model.layers.0."
Q_A, Q_B = f"{PREFIX}self_attn.q_proj.lora_A.weight", f"{PREFIX}self_attn.q_proj.lora_B.weight"
Tensors = dict[str, Tensor]


def build(tensors: Tensors, dtype: torch.dtype = torch.float32, **fields: Any) -> AdapterWeights:
    """What is loaded of these as a file's tensors."""
    with TemporaryDirectory() as name:
        folder = write_adapter(Path(name), tensors, **fields)
        return load_weights("sha256:0", folder / CONFIG_FILE, folder / WEIGHTS_FILE, LAYERS, dtype, CPU)


def survey(tensors: Tensors, dtype: torch.dtype) -> Survey:
    layout = fitted(parse_spec(config_bytes()), LAYERS, {name: tuple(t.shape) for name, t in tensors.items()})
    return survey_values(layout, tensors.items(), dtype)


def reasons(tensors: Tensors, error: type[InvalidAdapterError] = InvalidAdapterError, **fields: Any) -> tuple[str, ...]:
    with pytest.raises(InvalidAdapterError) as caught:
        build(tensors, **fields)
    assert caught.type is error
    return caught.value.reasons


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny_base(tmp_path_factory.mktemp("base"))


ORACLE: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank pattern": {"rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 1}},
    "alpha pattern": {"alpha_pattern": {r"layers\.0\..*": 3, "v_proj": 64}},
    "both patterns": {"rank_pattern": {"k_proj": 8}, "alpha_pattern": {"^model.layers.1.self_attn.k_proj": 5}},
    "all three": {"use_rslora": True, "rank_pattern": {".*_proj": 3}, "alpha_pattern": {"gate_proj": 2.5}},
    "rank 1": {"rank": 1, "use_rslora": True},
    "one layer": {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("fields", ORACLE.values(), ids=ORACLE.keys())
def test_the_delta_of_every_module_is_pefts(tmp_path: Path, base: Path, fields: dict[str, Any]) -> None:
    folder = tiny.save_adapter(tmp_path, base, seed=1, **fields)
    weights = load_weights("d", folder / CONFIG_FILE, folder / WEIGHTS_FILE, LAYERS, torch.float32, CPU)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    layers = {name: m for name, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    assert layers.keys() == weights.modules.keys()
    for name, module in weights.modules.items():
        expected = layers[name].get_delta_weight("default")
        torch.testing.assert_close(module.lora_B @ module.lora_A, expected, rtol=1e-5, atol=1e-6)
        assert layers[name].scaling["default"] != 1
        assert module.rank == layers[name].r["default"]


def test_an_adapter_lies_in_one_piece_of_memory() -> None:
    tensors = [tensor for module in build(factors()).modules.values() for tensor in module.tensors]
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors)
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(spans)]
    assert all(0 <= gap < 64 for gap in gaps)


def test_conv1d_has_the_same_factors_the_other_way_round(tmp_path: Path) -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    base = tiny.save_tiny_base(tmp_path / "base", gpt2)
    folder = tiny.save_adapter(tmp_path / "a", base, seed=1, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    shapes = {name: LinearShape(m.nx, m.nf) for name, m in model.named_modules() if isinstance(m, Conv1D)}
    weights = load_weights("d", folder / CONFIG_FILE, folder / WEIGHTS_FILE, LayerShapes(shapes), torch.float32, CPU)
    layer = PeftModel.from_pretrained(model, folder).base_model.model.transformer.h[0].attn.c_attn
    module = weights.modules["transformer.h.0.attn.c_attn"]
    torch.testing.assert_close((module.lora_B @ module.lora_A).T, layer.get_delta_weight("default"))


def test_weights_say_what_they_are() -> None:
    weights = build(factors(rank=4), torch.bfloat16)
    assert weights.digest == "sha256:0"
    assert (weights.rank, weights.targets) == (4, ("q_proj", "v_proj"))
    assert weights.num_parameters == 2 * 4 * (32 + 32 + 32 + 16)
    assert weights.nbytes == 2 * weights.num_parameters
    for path, module in weights.modules.items():
        assert module.lora_A.shape == (4, SHAPES[path].in_features)
        assert module.lora_B.shape == (SHAPES[path].out_features, 4)
        assert all(t.dtype == torch.bfloat16 and t.is_contiguous() for t in (module.lora_A, module.lora_B.t()))


def test_the_scaling_is_folded_in_float32() -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in factors().items()}
    module = build(tensors, torch.bfloat16).modules["model.layers.0.self_attn.q_proj"]
    assert torch.equal(module.lora_B, (tensors[Q_B].float() * 2.25).bfloat16())
    assert torch.equal(module.lora_A, tensors[Q_A])


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def adding(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.zeros(shape)}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


MISFITS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "A without B": (without(Q_B), "'model.layers.0.self_attn.q_proj' has no lora_B.weight"),
    "B without A": (without(Q_A), "'model.layers.0.self_attn.q_proj' has no lora_A.weight"),
    "wrong rank in A": (adding(Q_A, 8, 32), "lora_A.weight of shape [8, 32], rank 4 and the base need [4, 32]"),
    "wrong rank in B": (adding(Q_B, 32, 8), "lora_B.weight of shape [32, 8], rank 4 and the base need [32, 4]"),
    "wrong input": (adding(Q_A, 4, 64), "lora_A.weight of shape [4, 64], rank 4 and the base need [4, 32]"),
    "wrong output": (adding(Q_B, 16, 4), "lora_B.weight of shape [16, 4], rank 4 and the base need [32, 4]"),
    "one dimension": (adding(Q_A, 128), "lora_A.weight of shape [128], rank 4 and the base need [4, 32]"),
    "three dimensions": (adding(Q_A, 1, 4, 32), "lora_A.weight of shape [1, 4, 32]"),
    "no prefix": (renamed("base_model.model.", ""), "lacks the prefix base_model.model."),
    "wrong prefix": (renamed("base_model.model.model.", "base_model.model."), "is no linear layer of the base model"),
    "prefix twice": (renamed("base_model.model.", "base_model.model.base_model.model."), "is no linear layer"),
    "adapter's name inside": (renamed(".weight", ".mine.weight"), "has the adapter's name 'mine' in it"),
    "layer 10^9": (
        renamed("layers.1.", "layers.1000000000."),
        "'model.layers.1000000000.self_attn.q_proj' is no linear",
    ),
    "path upwards": (renamed("model.layers.0", "../../etc"), "is no linear layer"),
    "look-alike": (renamed("q_proj", "q_pr\u043ej"), "q_pr\\u043ej' is no linear layer"),
    "norm": (adding("base_model.model.model.norm.weight", 32), "'base_model.model.model.norm.weight' is no name of"),
    "bare norm": (adding("model.norm.weight", 32), "'model.norm.weight' is no name of a LoRA factor"),
    "base layer": (adding(f"{PREFIX}self_attn.q_proj.base_layer.weight", 32, 32), "base_layer.weight' is no name of"),
    "head": (adding("base_model.model.lm_head.weight", 259, 32), "lm_head.weight' is no name of"),
    "module not targeted": (
        renamed("q_proj", "o_proj"),
        "'model.layers.0.self_attn.o_proj' is in the file, but the config does not target it",
    ),
    "targeted module missing": (
        renamed("q_proj", "o_proj"),
        "'model.layers.1.self_attn.q_proj' is targeted, but not in the file",
    ),
    "nothing": (lambda _: {}, "holds no tensors"),
    "no factors": (lambda _: {"stranger": torch.zeros(1)}, "holds no LoRA factors"),
}


@pytest.mark.parametrize(("change", "complaint"), MISFITS.values(), ids=MISFITS.keys())
def test_a_file_that_does_not_fit(change: Callable[[Tensors], Tensors], complaint: str) -> None:
    assert complaint in "\n".join(reasons(change(factors())))


UNASKED = {
    "embedding": "base_model.model.model.embed_tokens.lora_embedding_A",
    "magnitude": f"{PREFIX}self_attn.q_proj.lora_magnitude_vector",
    "magnitude as a module": f"{PREFIX}self_attn.q_proj.lora_magnitude_vector.weight",
    "bias": f"{PREFIX}self_attn.q_proj.lora_B.bias",
    "saved module": "base_model.model.lm_head.modules_to_save.weight",
    "token deltas": "base_model.model.model.embed_tokens.trainable_tokens_delta",
}


@pytest.mark.parametrize("name", UNASKED.values(), ids=UNASKED.keys())
def test_kinds_that_the_config_does_not_ask_for_are_named(name: str) -> None:
    extra = {name: torch.zeros(4)}
    [reason] = reasons(factors() | extra)
    assert reason.startswith(f"{name!r} is in the file, but the config has no ")
    assert any(name in reason for reason in reasons(without(Q_A)(factors()) | extra))


def test_every_complaint_comes_at_once_and_long_lists_are_cut() -> None:
    tensors = adding(Q_A, 8, 32)(without(Q_B)(factors())) | {f"stranger{i}": torch.zeros(1) for i in range(60)}
    assert reasons(tensors)[-1] == "... and 12 more"
    text = "\n".join(reasons(adding(Q_A, 8, 32)(without(Q_B)(adding("stranger", 1)(factors())))))
    assert all(part in text for part in ("stranger", "lora_A.weight of shape", "no lora_B.weight"))


def test_a_config_of_another_rank_is_noticed() -> None:
    assert len(reasons(factors(rank=4), r=8)) == 8
    assert build(factors(rank=8), r=16, rank_pattern={".*": 8}).rank == 8


def test_all_linear_is_every_layer_but_the_head() -> None:
    names = [*tiny.ALL_LINEAR]
    assert len(build(factors(names), target_modules="all-linear").modules) == 14
    assert "is targeted, but not in the file" in reasons(factors(names[1:]), target_modules="all-linear")[0]
    assert "'lm_head' is in the file" in reasons(factors([*names, "lm_head"]), target_modules="all-linear")[0]
    assert build(factors(["lm_head"]), target_modules=["lm_head"]).targets == ("lm_head",)


def test_targets_by_regex() -> None:
    assert build(factors(), target_modules=r".*\.(q|v)_proj").targets == ("q_proj", "v_proj")
    assert len(reasons(factors(), target_modules=r".*\.[qk]_proj")) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_are_named(value: float, dtype: torch.dtype) -> None:
    tensors = factors()
    tensors[Q_A][1, 2] = tensors[Q_B][0, 0] = value
    assert reasons(tensors, dtype=dtype) == (f"{Q_A!r} holds NaN or infinity", f"{Q_B!r} holds NaN or infinity")


def test_pieces_make_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swaplora_adapters.weights.values.PIECE", 24)
    tensors = factors()
    module = build(tensors, torch.bfloat16).modules["model.layers.0.self_attn.q_proj"]
    assert torch.equal(module.lora_B, (tensors[Q_B] * 2.25).bfloat16())
    tensors[Q_B][-1, -1] = float("nan")
    assert reasons(tensors) == (f"{Q_B!r} holds NaN or infinity",)


def test_values_that_overflow_only_as_they_are_served_are_named() -> None:
    tensors = factors() | {Q_B: torch.full((32, 4), 3e4)}
    with pytest.raises(InvalidAdapterError, match="overflows float16 once it is scaled"):
        survey(tensors, torch.float16)
    assert survey(tensors, torch.bfloat16).has_effect
    assert reasons(factors() | {Q_B: torch.full((32, 4), 3e38)})[0].endswith("overflows float32 once it is scaled")


def test_an_adapter_with_zero_b_has_no_effect() -> None:
    tensors = {name: tensor * ("lora_A" in name) for name, tensor in factors().items()}
    assert not survey(tensors, torch.float32).has_effect
    assert survey(factors(), torch.float32).has_effect


def test_the_header_alone_is_enough_to_know_whether_a_file_fits(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    header = read_header(folder / WEIGHTS_FILE)
    check_fit(parse_spec(config_bytes()), header, LAYERS)
    with pytest.raises(InvalidAdapterError, match="rank 5 and the base need"):
        check_fit(parse_spec(config_bytes(r=5)), header, LAYERS)


def test_what_patterns_may_cost_is_judged_alike_every_time_and_only_as_a_file_comes_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = {f"^{path}": 4 for path in SHAPES}
    folder = write_adapter(tmp_path, rank_pattern=ranks)
    paths = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    spec, header = parse_spec(config_bytes(rank_pattern=ranks)), read_header(folder / WEIGHTS_FILE)

    def is_let_in(max_work: int) -> bool:
        try:
            check_fit(spec, header, LAYERS, max_work)
        except InvalidAdapterError:
            return False
        return True

    needed = bisect.bisect_left(range(MAX_WORK), True, key=is_let_in)
    assert 0 < needed < MAX_WORK // 100
    assert [is_let_in(needed) for _ in range(5)] == [True] * 5
    assert [is_let_in(needed - 1) for _ in range(5)] == [False] * 5
    monkeypatch.setattr(intake, "MAX_WORK", needed - 1)
    with pytest.raises(InvalidAdapterError, match="its patterns are too much work"):
        intake.inspect_files(*paths, LAYERS)
    assert load_weights("d", *paths, LAYERS, torch.float32, CPU).modules


def test_files_of_the_same_header_and_config_are_fitted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []

    def checked(spec: AdapterSpec, header: Header, layers: BaseLayers) -> Layout:
        found.append(spec.base_model_name_or_path or "")
        return check_fit(spec, header, layers)

    one, other = factors(), {name: 2 * tensor for name, tensor in factors().items()}
    alone = build(one), build(other), build(other), build(other, lora_alpha=1)
    monkeypatch.setattr(load, "check_fit", checked)
    fits = Fits(LAYERS)

    def loaded(name: str, tensors: Tensors, **fields: Any) -> AdapterWeights:
        folder = write_adapter(tmp_path / name, tensors, base_model_name_or_path=name, **fields)
        paths = folder / CONFIG_FILE, folder / WEIGHTS_FILE
        return load_weights("d", *paths, LAYERS, torch.float32, CPU, None, fits)

    weights = loaded("a", one), loaded("a2", other), loaded("a", other), loaded("a", other, lora_alpha=1)
    assert found == ["a", "a2", "a"]
    for own, expected in zip(weights, alone, strict=True):
        for path, module in expected.modules.items():
            assert torch.equal(own.modules[path].lora_B, module.lora_B)
    wider = {name: torch.cat([tensor, tensor], -1) for name, tensor in one.items()}
    for _ in range(2):
        with pytest.raises(InvalidAdapterError):
            loaded("a", wider)
    assert len(found) == 5
    monkeypatch.setattr(load, "_LONGEST_KEPT", 1)
    loaded("a", one)
    assert len(found) == 6


def test_the_hand_made_shapes_are_the_tiny_model_s() -> None:
    linears = {name: m for name, m in tiny.tiny_model().named_modules() if isinstance(m, nn.Linear)}
    assert {name: LinearShape(m.in_features, m.out_features) for name, m in linears.items()} == SHAPES
    assert CONFIG["lora_alpha"] != CONFIG["r"]


def test_a_low_rank_that_nothing_is_left_of_adds_nothing(tmp_path: Path) -> None:
    masks = {f"model.layers.{layer}.self_attn.{name}.lora_E": [False] * 4 for layer in (0, 1) for name in _QV}
    config: dict[str, Any] = {"peft_type": "ADALORA", "init_r": 4, "rank_pattern": masks}
    tensors = {name.removesuffix(".weight"): tensor for name, tensor in factors().items()}
    tensors = {name: tensor[:0] if name.endswith("A") else tensor[:, :0] for name, tensor in tensors.items()}
    tensors |= {name.replace("lora_A", "lora_E"): torch.empty(0, 1) for name in tensors if name.endswith("lora_A")}
    folder = write_adapter(tmp_path, {name: tensor.contiguous() for name, tensor in tensors.items()}, **config)
    weights = load_weights("d", folder / CONFIG_FILE, folder / WEIGHTS_FILE, LAYERS, torch.float32, CPU)
    assert (weights.modules, weights.rank) == ({}, 0)


_QV = ("q_proj", "v_proj")
