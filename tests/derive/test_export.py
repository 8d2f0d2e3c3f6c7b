"""`swaplora merge` writes what PEFT's merge_and_unload makes, in the base's own number format, or nothing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from adapter_files import factors, write_adapter
from fake_server import swaplora

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
TOKENS = torch.tensor([[72, 101, 108, 108, 111]])


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SWAPLORA_LOG_LEVEL", "warning")
    monkeypatch.setenv("SWAPLORA_CACHE_DIR", str(tmp_path / "cache"))
    yield
    structlog.reset_defaults()  # its logger writes to the stderr of one run of the command


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS).logits.float()
    return found


def peft_merged(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(load(base), str(adapter)).merge_and_unload().eval()


@pytest.mark.parametrize(("overrides", "targets"), [(tiny.LLAMA, tiny.ALL_LINEAR), (GPT2, ("c_attn", "c_proj"))])
def test_a_merged_model_is_pefts(tmp_path: Path, overrides: Any, targets: tuple[str, ...]) -> None:
    base = tiny.save_tiny_base(tmp_path / "base", overrides)
    fields = {"fan_in_fan_out": True} if overrides is GPT2 else {}
    adapter = tiny.save_adapter(tmp_path / "a", base, seed=1, target_modules=targets, **fields)
    done = swaplora("merge", str(adapter), "--base", str(base), "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    expected = logits(peft_merged(base, adapter))
    found = logits(load(tmp_path / "out"))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, logits(load(base)), atol=0.1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"
    assert not list(tmp_path.glob(".out*"))


def test_several_adapters_are_added_with_their_scales(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    two = [str(adapters[1]), str(adapters[3])]
    scales = ("--scale", "0.5", "--scale=-1.5")
    done = swaplora("merge", *two, *scales, "--base", str(base), "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    model = PeftModel.from_pretrained(load(base), two[0], adapter_name="one")
    model.load_adapter(two[1], adapter_name="two")
    merged = dict(load(tmp_path / "out").named_parameters())
    for path, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            delta = 0.5 * module.get_delta_weight("one") - 1.5 * module.get_delta_weight("two")
            assert torch.allclose(merged[f"{path}.weight"], module.base_layer.weight + delta, atol=1e-6), path


def test_the_base_keeps_its_number_format_and_the_sum_is_made_in_float32(base: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    load(base).to(torch.bfloat16).save_pretrained(half)
    tiny.byte_tokenizer().save_pretrained(half)
    adapter = tiny.save_adapter(tmp_path / "a", base, seed=1)
    assert swaplora("merge", str(adapter), "--base", str(half), "--out", str(tmp_path / "out")).exit_code == 0
    merged, whole = load(tmp_path / "out"), load(half).float()
    expected = PeftModel.from_pretrained(whole, str(adapter)).merge_and_unload()
    for (name, found), wanted in zip(merged.named_parameters(), expected.parameters(), strict=True):
        assert found.dtype == torch.bfloat16
        assert torch.allclose(found.float(), wanted, rtol=2**-8, atol=1e-5), name  # half a step of bfloat16


def test_a_tied_head_is_changed_without_its_embedding(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", factors(["lm_head"]), target_modules=["lm_head"])
    assert swaplora("merge", str(adapter), "--base", str(base), "--out", str(tmp_path / "out")).exit_code == 0
    merged, plain = load(tmp_path / "out"), load(base)
    assert torch.equal(merged.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    tensors = factors(["lm_head"])
    a, b = (tensors[f"base_model.model.lm_head.lora_{letter}.weight"] for letter in "AB")
    assert torch.allclose(merged.lm_head.weight, plain.lm_head.weight + 9 / 4 * b @ a, atol=1e-5)


def test_nothing_is_written_over_or_half(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    done = swaplora("merge", str(adapters[0]), "--base", str(base), "--out", str(out))
    assert (done.exit_code, "not an empty folder" in done.stderr) == (1, True)
    assert [path.name for path in out.iterdir()] == ["mine"]
    broken = write_adapter(tmp_path / "broken", factors(rank=3))
    done = swaplora("merge", str(broken), "--base", str(base), "--out", str(tmp_path / "new"))
    assert (done.exit_code, "rank 4 and the base need" in done.stderr) == (1, True)
    assert not (tmp_path / "new").exists()
    done = swaplora("merge", str(adapters[0]), str(adapters[1]), "--scale", "2", "--base", str(base), "--out", "x")
    assert (done.exit_code, done.stderr) == (
        2,
        "swaplora: 2 adapters have 1 scales: give one --scale for each, or none\n",
    )
    done = swaplora("merge", str(tmp_path / "nowhere"), "--base", str(base), "--out", "x")
    assert (done.exit_code, "has no adapter_config.json" in done.stderr) == (1, True)


def test_the_merged_model_is_a_base_of_its_own(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "empty"
    out.mkdir()
    assert swaplora("merge", str(adapters[2]), "--base", str(base), "--out", str(out)).exit_code == 0
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    assert (out / "tokenizer_config.json").exists()
