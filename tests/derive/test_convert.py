"""Adapters of other kinds made into LoRA at upload: PEFT's own delta, cut to a share of its energy, or refused."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import FourierFTConfig, LoHaConfig, LoKrConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.lora.conversion import convert_to_lora
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny
from adapter_files import SHAPES
from oracle import Oracle
from serving import Running
from swaplora_adapters.config.parse import CONVERTIBLE_KINDS
from swaplora_adapters.derive.convert import CUTS, Converted, convert
from swaplora_adapters.derive.kinds import KINDS
from swaplora_adapters.errors import InvalidAdapterError, UnsupportedAdapterError
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE

GUARD_SECONDS = 600  # what is computed runs at low priority
PROMPT = [72, 101, 108, 108, 111]
CONFIGS: Mapping[str, tuple[type, dict[str, Any]]] = {
    "loha": (
        LoHaConfig,
        {"r": 2, "alpha": 5, "target_modules": ["q_proj", "down_proj"], "alpha_pattern": {"q_proj": 3}},
    ),
    "loha of a high rank": (
        LoHaConfig,
        {"r": 2, "alpha": 5, "target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 6}},
    ),
    "lokr": (LoKrConfig, {"r": 2, "alpha": 5, "target_modules": ["q_proj", "k_proj", "gate_proj"]}),
    "lokr of factors": (LoKrConfig, {"r": 1, "alpha": 3, "target_modules": "all-linear", "decompose_both": True}),
    "vera": (VeraConfig, {"r": 6, "target_modules": ["k_proj", "q_proj"]}),
    "vera by seed": (
        VeraConfig,
        {
            "r": 16,
            "target_modules": ["q_proj", "gate_proj"],  # neither as wide as it is high
            "layers_to_transform": [1],
            "save_projection": False,
            "projection_prng_key": 7,
        },
    ),
    "fourierft": (
        FourierFTConfig,
        {"n_frequency": 20, "scaling": 90.0, "random_loc_seed": 3, "target_modules": ["q_proj", "up_proj"]},
    ),
}
Make = Callable[[str], tuple[Path, PeftModel]]


@pytest.fixture(scope="module")
def make(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """An adapter of `CONFIGS` with random values, on disk and in PEFT."""
    made: dict[str, tuple[Path, PeftModel]] = {}

    def get(name: str) -> tuple[Path, PeftModel]:
        if name not in made:
            torch.manual_seed(3)
            kind, fields = CONFIGS[name]
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), kind(**fields))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.normal_(std=0.5)
            folder = tmp_path_factory.mktemp("convertible")
            model.save_pretrained(folder)
            made[name] = folder, model
        return made[name]

    return get


def converted(folder: Path, energy: float = 0.99) -> Converted:
    return convert(folder / CONFIG_FILE, folder / WEIGHTS_FILE, SHAPES, energy)


def changed(folder: Path, into: Path, tensors: Mapping[str, Tensor] | None = None, **fields: Any) -> Path:
    """A copy of an adapter with other fields or other tensors."""
    into.mkdir()
    config = json.loads((folder / CONFIG_FILE).read_text()) | fields
    (into / CONFIG_FILE).write_text(json.dumps(config))
    save_file(dict(load_file(folder / WEIGHTS_FILE) if tensors is None else tensors), into / WEIGHTS_FILE)
    return into


def peft_delta(model: PeftModel, path: str) -> Tensor:
    delta: Tensor = model.base_model.model.get_submodule(path).get_delta_weight("default").detach().float()
    return delta


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, about projections that are not saved
@pytest.mark.parametrize("name", CONFIGS)
def test_all_the_energy_is_the_whole_delta_and_less_is_off_by_what_is_told(make: Make, name: str) -> None:
    folder, model = make(name)
    whole, cut = converted(folder, energy=1.0), converted(folder, energy=0.9)
    assert whole.modules.keys() == {path for path in SHAPES if hasattr(module_of(model, path), "get_delta_weight")}
    for path in whole.modules:
        expected = peft_delta(model, path)
        exact, part = whole.modules[path], cut.modules[path]
        assert relative(exact.lora_B @ exact.lora_A, expected) < 5e-6
        error = relative(part.lora_B @ part.lora_A, expected)
        assert error == pytest.approx(part.error, rel=1e-3, abs=5e-6)
        assert error <= 0.1**0.5 + 1e-6
    assert sum(m.rank for m in cut.modules.values()) <= sum(m.rank for m in whole.modules.values())


def module_of(model: PeftModel, path: str) -> torch.nn.Module:
    found: torch.nn.Module = model.base_model.model.get_submodule(path)
    return found


@pytest.mark.parametrize("name", ["loha", "lokr", "vera", "fourierft"])
def test_the_ranks_are_those_that_peft_would_choose(make: Make, name: str) -> None:
    folder, model = make(name)
    _, tensors = convert_to_lora(model, rank=0.95)
    expected = {key.removesuffix(".lora_A.weight"): t.shape[0] for key, t in tensors.items() if "lora_A" in key}
    ours = converted(folder, energy=0.95).modules
    assert {f"base_model.model.{path}": module.rank for path, module in ours.items()} == expected


def test_the_kinds_that_a_refusal_says_can_be_converted_are_those_that_can() -> None:
    assert KINDS.keys() == CUTS.keys() == CONVERTIBLE_KINDS


@pytest.mark.parametrize(
    ("name", "fields", "complaint"),
    [
        ("loha", {"use_rslora": True}, "'use_rslora' is not supported"),
        ("loha", {"modules_to_save": ["lm_head"]}, "'modules_to_save' is not supported"),
        ("loha", {"peft_type": "IA3"}, "peft_type 'IA3' cannot be converted"),
        ("vera", {"bias": "all"}, "bias 'all' is not supported"),
        ("vera", {"rank_pattern": {"q_proj": 3}}, "'rank_pattern' is not supported"),
        ("fourierft", {"wavelet": "db1"}, "'wavelet' is not supported"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(
    make: Make, tmp_path: Path, name: str, fields: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UnsupportedAdapterError, match=complaint):
        converted(changed(make(name)[0], tmp_path / "changed", **fields))


@pytest.mark.parametrize(
    ("name", "fields", "complaint"),
    [
        ("loha", {"peft_type": "LORA"}, "LORA already"),
        ("loha", {"peft_type": 3}, "with a peft_type"),
        ("loha", {"r": 3}, "hada_w1_a of shape"),
        ("loha", {"r": 0}, "r must be an integer"),
        ("loha", {"target_modules": ["q_proj"]}, "is not targeted"),
        ("loha", {"target_modules": ["q_proj", "down_proj", "up_proj"]}, "up_proj' has no hada_w1_a"),
        ("loha", {"target_modules": ["nothing"]}, "targets no linear layer"),
        ("lokr", {"alpha": "x"}, "alpha must be a number"),
        ("vera", {"r": 5}, r"vera_A is of shape \[6, 32\], the rank and the base need \[5, 32\]"),
        ("vera", {"save_projection": False}, "save_projection is false"),
        ("vera", {"save_projection": 1}, "save_projection must be true or false"),
        ("vera", {"projection_prng_key": -1}, "projection_prng_key must be"),
        ("vera", {"target_modules": ["q_proj", "k_proj", "down_proj"]}, "down_proj' has no vera_lambda_b"),
        ("fourierft", {"random_loc_seed": 2**64}, "random_loc_seed must be"),
        ("fourierft", {"scaling": 0}, "scaling must be a number"),
    ],
)
def test_a_config_that_does_not_fit_its_file_is_refused(
    make: Make, tmp_path: Path, name: str, fields: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InvalidAdapterError, match=complaint):
        converted(changed(make(name)[0], tmp_path / "changed", **fields))


def test_modules_that_are_not_targeted_are_named_in_the_files_order(make: Make, tmp_path: Path) -> None:
    folder = make("lokr of factors")[0]
    paths = dict.fromkeys(name.rpartition(".")[0] for name in load_file(folder / WEIGHTS_FILE))
    with pytest.raises(InvalidAdapterError) as refused:
        converted(changed(folder, tmp_path / "changed", target_modules=["q_proj"]))
    told = [reason for reason in refused.value.reasons if "is not targeted" in reason]
    others = [path.removeprefix("base_model.model.") for path in paths if not path.endswith("q_proj")]
    assert [reason.split("'")[1] for reason in told] == others[: len(told)]
    assert len(told) > 5


@pytest.mark.parametrize(
    ("name", "old", "new", "complaint"),
    [
        ("loha", "hada_w1_a", "hada_t1", "is no name of a tensor of this kind"),
        ("loha", "hada_w1_a", "lora_A.weight", "is no name of a tensor of this kind"),
        ("lokr", "lokr_w1", "lokr_w1_a", "needs lokr_w1, or"),
        ("vera", "base_model.vera_A", "base_model.vera_C", "is no name of a tensor of this kind"),
        ("fourierft", "fourierft_spectrum", "spectrum", "is no name of a tensor of this kind"),
    ],
)
def test_tensors_under_other_names_are_refused(
    make: Make, tmp_path: Path, name: str, old: str, new: str, complaint: str
) -> None:
    folder, _ = make(name)
    tensors = {key.replace(old, new): tensor for key, tensor in load_file(folder / WEIGHTS_FILE).items()}
    with pytest.raises(InvalidAdapterError, match=complaint):
        converted(changed(folder, tmp_path / "changed", tensors))


@pytest.mark.parametrize("name", ["loha", "lokr", "vera", "fourierft"])
@pytest.mark.parametrize("spoil", ["shape", "dimension", "nan"])
def test_tensors_of_other_shapes_and_values_are_refused(make: Make, tmp_path: Path, name: str, spoil: str) -> None:
    folder, _ = make(name)
    tensors = load_file(folder / WEIGHTS_FILE)
    for key, tensor in tensors.items():
        worse = {
            "shape": torch.cat([tensor] * 4096),
            "dimension": tensor[None],
            "nan": torch.full_like(tensor, float("nan")),
        }
        with pytest.raises(InvalidAdapterError):
            converted(changed(folder, tmp_path / f"{key}-{spoil}", tensors | {key: worse[spoil]}))


def test_a_delta_of_zero_is_converted(make: Make, tmp_path: Path) -> None:
    folder, _ = make("loha")
    tensors = {key: torch.zeros_like(tensor) for key, tensor in load_file(folder / WEIGHTS_FILE).items()}
    found = converted(changed(folder, tmp_path / "zero", tensors)).modules
    assert {(module.rank, module.error) for module in found.values()} == {(1, 0.0)}


def put(server: Running, name: str, folder: Path, query: str) -> Any:
    with (folder / CONFIG_FILE).open("rb") as config, (folder / WEIGHTS_FILE).open("rb") as weights:
        files = {"config": config, "weights": weights}
        return server.client.put(f"/v1/adapters/{name}{query}", files=files, timeout=GUARD_SECONDS)


def test_an_upload_is_converted_when_asked_and_answers_as_peft_does(server: Running, base: Path, make: Make) -> None:
    folder, _ = make("loha")
    refused = server.put("converted", folder)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "unsupported_adapter")
    assert "?convert=svd" in refused.json()["error"]["message"]
    stored = put(server, "converted", folder, "?convert=svd&convert_energy=1.0")
    assert stored.status_code == 201, stored.text
    provenance = stored.json()["provenance"]
    error = provenance.pop("error")
    assert provenance == {"kind": "converted", "energy": 1.0, "from_kind": "LOHA"}
    assert 0 <= error["overall"] <= error["max"] < 1e-6
    answer = server.generate("converted", PROMPT, 16)
    oracle = Oracle(base, folder)
    assert oracle.is_greedy(PROMPT, answer.json()["choices"][0]["token_ids"], tie=2e-4)
    again = put(server, "converted", folder, "?convert=svd&convert_energy=1.0").json()
    assert (again["version"], again["digest"]) == (1, stored.json()["digest"])


def test_what_is_wrong_with_an_upload_to_convert_is_told_as_with_any_other(
    server: Running, make: Make, tmp_path: Path
) -> None:
    broken = changed(make("loha")[0], tmp_path / "broken", r=3)
    for folder, query, status, code in [
        (broken, "?convert=svd", 422, "invalid_adapter"),
        (make("loha")[0], "?convert=pca", 400, "invalid_request"),
        (make("loha")[0], "?convert=svd&convert_energy=0", 400, "invalid_request"),
        (make("loha")[0], "?convert=svd&convert_energy=nan", 400, "invalid_request"),
        (make("loha")[0], "?convert_energy=0.5", 400, "invalid_request"),
    ]:
        answer = put(server, "wrong", folder, query)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert server.client.get("/v1/adapters/wrong").status_code == 404


def test_a_lora_that_is_to_be_converted_is_refused(server: Running, base: Path, tmp_path: Path) -> None:
    answer = put(server, "plain", tiny.save_adapter(tmp_path, base, seed=1), "?convert=svd")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_adapter")
