"""`swaplora extract` gives back the adapter that a model was made with, and refuses what no adapter can hold."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import tiny
from fake_server import swaplora
from swaplora_adapters.derive.whole_models.extract import holding
from test_export import GPT2, load, logits

Change = Callable[[Any], None]


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SWAPLORA_LOG_LEVEL", "warning")
    monkeypatch.setenv("SWAPLORA_CACHE_DIR", str(tmp_path / "cache"))
    yield
    structlog.reset_defaults()  # its logger writes to the stderr of one run of the command


def merged(base: Path, adapter: Path, out: Path) -> Any:
    """A full fine-tune as if trained: the base with an adapter merged in by PEFT."""
    model = PeftModel.from_pretrained(load(base), str(adapter)).merge_and_unload().eval()
    model.save_pretrained(out)
    return model


def changed(base: Path, out: Path, change: Change) -> Path:
    model = load(base)
    with torch.no_grad():
        change(model)
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize(("overrides", "targets"), [(tiny.LLAMA, tiny.ALL_LINEAR), (GPT2, ("c_attn", "c_proj"))])
def test_a_merged_adapter_comes_back_with_its_rank(tmp_path: Path, overrides: Any, targets: tuple[str, ...]) -> None:
    base = tiny.save_tiny_base(tmp_path / "base", overrides)
    fields = {"fan_in_fan_out": True} if overrides is GPT2 else {}
    adapter = tiny.save_adapter(tmp_path / "a", base, seed=1, target_modules=targets, **fields)
    expected = logits(merged(base, adapter, tmp_path / "tuned"))
    limits = ("--rank", "8", "--energy", "0.999999")
    done = swaplora(
        "extract", str(tmp_path / "tuned"), "--base", str(base), "--out", str(tmp_path / "out"), *limits, "--json"
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert {part["rank"] for part in told["modules"].values()} == {4}
    assert told["error"] < 1e-3
    assert not told["left_out"]
    found = logits(PeftModel.from_pretrained(load(base), str(tmp_path / "out")))
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, logits(load(base)), atol=0.1)
    assert not list(tmp_path.glob(".out*"))


def test_what_is_written_is_valid_for_a_server_of_the_base(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    merged(base, adapters[3], tmp_path / "tuned")
    assert (
        swaplora("extract", str(tmp_path / "tuned"), "--base", str(base), "--out", str(tmp_path / "out")).exit_code == 0
    )
    done = swaplora("adapters", "validate", str(tmp_path / "out"), "--base", str(base), "--json")
    assert (done.exit_code, json.loads(done.stdout)["warnings"]) == (0, []), done.output


def test_a_lower_rank_is_the_nearest_of_its_rank_and_its_error_is_told(base: Path, tmp_path: Path) -> None:
    """Against the singular values of the difference itself."""

    def change(model: Any) -> None:
        weight = model.model.layers[0].mlp.up_proj.weight
        weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))

    tuned = changed(base, tmp_path / "tuned", change)
    done = swaplora("extract", str(tuned), "--base", str(base), "--out", str(tmp_path / "out"), "--rank", "3", "--json")
    path = "model.layers.0.mlp.up_proj"
    delta = load(tuned).get_submodule(path).weight - load(base).get_submodule(path).weight
    values = torch.linalg.svdvals(delta.detach().double())
    told = json.loads(done.stdout)["modules"]
    assert told == {path: {"rank": 3, "error": pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-4)}}
    model = PeftModel.from_pretrained(load(base), str(tmp_path / "out"))
    kept = model.base_model.model.get_submodule(path).get_delta_weight("default")
    assert float((kept - delta).detach().norm()) == pytest.approx(float(values[3:].norm()), rel=1e-4)


def test_energy_chooses_the_rank_of_each_module() -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 1.0])  # squares 9, 4, 1, 1 of 15
    ranks = [holding(energy, 64)(values) for energy in (0.5, 0.6, 0.61, 13 / 15, 0.9, 1.0)]
    assert ranks == [1, 1, 2, 2, 3, 4]
    assert holding(1.0, 2)(values) == 2


def norms(model: Any) -> None:
    model.model.norm.weight += 0.5


def head_of_its_own(model: Any) -> None:
    model.model.embed_tokens.weight += 0.5


def not_finite(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")


def longer_rope(model: Any) -> None:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (norms, "model.norm.weight differs and is no weight of a linear"),
        (head_of_its_own, "model.embed_tokens.weight differs and is no weight of a linear"),
        (not_finite, "model.layers.0.mlp.up_proj.weight has numbers that are not finite"),
        (longer_rope, "rope_parameters in its config.json is not the base's"),
        (lambda model: model.resize_token_embeddings(300), "vocab_size in its config.json is not the base's"),
        (lambda model: None, "no linear of the fine-tune differs from the base's"),
    ],
)
def test_what_no_adapter_can_hold_is_refused_by_name(base: Path, tmp_path: Path, change: Change, words: str) -> None:
    tuned = changed(base, tmp_path / "tuned", change)
    done = swaplora("extract", str(tuned), "--base", str(base), "--out", str(tmp_path / "out"))
    assert done.exit_code == 1
    assert words in done.stderr
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


def test_what_may_be_left_out_is_told_with_how_far_it_moved(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    model = merged(base, adapters[3], tmp_path / "tuned")
    with torch.no_grad():
        model.model.norm.weight *= 1.5
    model.config.eos_token_id = 7
    model.save_pretrained(tmp_path / "tuned")
    words = ("extract", str(tmp_path / "tuned"), "--base", str(base), "--out", str(tmp_path / "out"))
    done = swaplora(*words, "--leave-out", "*norm*", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["left_out"] == {"model.norm.weight": pytest.approx(0.5)}
    assert told["other_tokens"] == ["eos_token_id"]


def test_weights_under_other_names_are_refused_and_not_drawn_at_random(base: Path, tmp_path: Path) -> None:
    tuned = changed(base, tmp_path / "tuned", lambda model: None)
    tensors = load_file(tuned / "model.safetensors")
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    save_file(
        {"module." * (key == name) + key: x for key, x in tensors.items()},
        tuned / "model.safetensors",
        {"format": "pt"},
    )
    done = swaplora("extract", str(tuned), "--base", str(base), "--out", str(tmp_path / "out"))
    assert (done.exit_code, f"{name} is not in its files" in done.stderr) == (1, True), done.output
    assert f"module.{name} is in its files and in no part of the model" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("--energy", "0"), 2, "--energy is a share"),
        (("--energy", "nan"), 2, "--energy is a share"),
        (("--rank", "0"), 2, "--rank"),
    ],
)
def test_bad_options_are_named(base: Path, tmp_path: Path, args: tuple[str, ...], code: int, words: str) -> None:
    done = swaplora("extract", str(base), "--base", str(base), "--out", str(tmp_path / "out"), *args)
    assert (done.exit_code, words in done.stderr) == (code, True), done.output


def test_a_folder_that_is_none_and_one_that_is_no_model(base: Path, tmp_path: Path) -> None:
    out = ("--base", str(base), "--out", str(tmp_path / "out"))
    assert "is no folder" in swaplora("extract", str(tmp_path / "nowhere"), *out).stderr
    (tmp_path / "empty").mkdir()
    done = swaplora("extract", str(tmp_path / "empty"), *out)
    assert (done.exit_code, "Traceback" in done.output) == (1, False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert "not an empty folder" in swaplora("extract", str(base), *out).stderr
