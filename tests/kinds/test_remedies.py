"""A remedy that a refusal names, done to the letter, leads to an adapter that is served with PEFT's numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peft_kinds
import tiny
from model_layers import layers_of
from other_writers import SPELLINGS, peft_logits, rewritten
from swaplora_adapters.errors import InvalidAdapterError
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.intake import inspect_files
from test_kinds_files import load, plain, serve
from test_other_writers import IDS

# of PEFT's: inits that are converted, fields that it ignores
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peft_kinds.save_base("llama", tmp_path_factory.mktemp("base"))


def refusal(base: Path, adapter: Path) -> str:
    with pytest.raises(InvalidAdapterError) as caught:
        inspect_files(adapter / CONFIG_FILE, adapter / WEIGHTS_FILE, layers_of(plain(base)))
    return "\n".join(caught.value.reasons)


@torch.no_grad()
def check_served(base: Path, adapter: Path) -> None:
    """As PEFT has it, and not as the base."""
    model = plain(base)
    before, layers = model(IDS).logits.log_softmax(-1), layers_of(model)
    inspect_files(adapter / CONFIG_FILE, adapter / WEIGHTS_FILE, layers)
    serve(model, load(adapter, layers))
    expected = peft_logits(base, adapter, IDS)
    assert expected is not None
    assert (expected.log_softmax(-1) - before).abs().max() > 0.5
    torch.testing.assert_close(model(IDS).logits.log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=1e-4)


def initialised(base: Path, init: str, **fields: Any) -> PeftModel:
    """A model that has changed its base, before training."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=init, **fields
    )
    if init == "corda":
        config.corda_config = CordaConfig(corda_method="kpm")
        preprocess_corda(model, config, run_model=torch.no_grad()(lambda: model(IDS)))
    return get_peft_model(model, config)


@torch.no_grad()
def train(model: PeftModel) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda"])
def test_what_changed_its_base_is_saved_again_as_plain_lora(
    init: str, use_rslora: bool, base: Path, tmp_path: Path
) -> None:
    model = initialised(base, init, use_rslora=use_rslora)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    train(model)
    with torch.no_grad():
        trained = model(IDS).logits
    model.save_pretrained(tmp_path / "as it is")
    assert "save_pretrained(..., path_initial_model_for_weight_conversion=...)" in refusal(base, tmp_path / "as it is")
    model.save_pretrained(tmp_path / "again", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    check_served(base, tmp_path / "again")
    converted = peft_logits(base, tmp_path / "again", IDS)
    assert converted is not None
    torch.testing.assert_close(converted, trained, rtol=0, atol=1e-3)  # what was trained, on the base as it was


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_or_the_base_that_it_changed_is_served(init: str, base: Path, tmp_path: Path) -> None:
    """LoftQ's own initialisation wants a package that PEFT does not bring; a base is changed all the same."""
    model = initialised(base, "pissa")
    train(model)
    with torch.no_grad():
        trained = model(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    tiny.edit_config(tmp_path / "adapter", init_lora_weights=init, loftq_config={"loftq_bits": 4})
    assert "serve that changed base, saved with it, and set init_lora_weights to true" in refusal(
        base, tmp_path / "adapter"
    ).replace("Serve", "serve")
    model.unload().save_pretrained(tmp_path / "base")
    tiny.edit_config(tmp_path / "adapter", init_lora_weights=True)
    check_served(tmp_path / "base", tmp_path / "adapter")
    expected = peft_logits(tmp_path / "base", tmp_path / "adapter", IDS)
    assert expected is not None
    torch.testing.assert_close(expected, trained, rtol=0, atol=1e-4)


Mend = Callable[[Path], None]


def edited(**fields: Any) -> Mend:
    return lambda folder: tiny.edit_config(folder, **fields)


def without(*fields: str) -> Mend:
    def mend(folder: Path) -> None:
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps({k: v for k, v in config.items() if k not in fields}))

    return mend


def renamed(old: str, new: str) -> Mend:
    def mend(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_FILE)
        save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)

    return mend


REMEDIES: dict[str, tuple[dict[str, Any], str, str, Mend]] = {
    "a field that is not known": (
        {"use_merged_linear": True},
        "",
        "'use_merged_linear' is not supported, it must be null, false or empty",
        edited(use_merged_linear=False),
    ),
    "a field that is not known, taken out": (
        {"loraplus": 16},
        "",
        "'loraplus' is not supported, it must be null, false or empty",
        without("loraplus"),
    ),
    "a pattern that is not regular": (
        {"target_modules": r"(?i).*\.(q_proj|down_proj)"},
        "",
        "syntax that is not supported: flags",
        edited(target_modules=r".*\.(q_proj|down_proj)"),
    ),
    "too much work": (
        {"target_modules": "(?:" * 9 + "(?:.?){9}" + "){9}" * 9},
        "",
        "target_modules: its patterns are too much work to match, name the modules",
        edited(target_modules=["q_proj", "down_proj"]),
    ),
    "layers by alternatives": (
        {"layers_to_transform": [0, 1], "layers_pattern": "h|layers"},
        "",
        "must have its alternatives in a group",
        edited(layers_pattern="(?:h|layers)"),
    ),
    "another adapter's name": (
        {},
        "another adapter's",
        "has the adapter's name 'mine' in it, under which PEFT finds nothing: take it out",
        renamed(".mine", ""),
    ),
    "a wrapped model": (
        {},
        "of DistributedDataParallel",
        "is a name of a wrapped model (module.), under which PEFT finds nothing: unwrap the model to save it",
        renamed("module.base_model", "base_model"),
    ),
    "no prefix": (
        {},
        "without prefix",
        "lacks the prefix base_model.model., without which PEFT finds nothing",
        renamed("model.layers", "base_model.model.model.layers"),
    ),
}


@pytest.mark.parametrize(("fields", "spelling", "complaint", "mend"), REMEDIES.values(), ids=REMEDIES.keys())
def test_what_a_refusal_says_is_to_be_done_helps(
    fields: dict[str, Any], spelling: str, complaint: str, mend: Mend, base: Path, tmp_path: Path
) -> None:
    source = peft_kinds.make("plain", base, tmp_path / "source", seed=1)
    folder = rewritten(source, tmp_path / "adapter", SPELLINGS.get(spelling, str))
    tiny.edit_config(folder, **fields)
    assert complaint in refusal(base, folder)
    mend(folder)
    check_served(base, folder)
