"""The base with an adapter that can be learnt, and what says which base it was."""

import hashlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from swaplora_adapters.config.parse import read_spec
from swaplora_adapters.derive.base_files import BaseFiles
from swaplora_adapters.derive.intruders import count_intruders
from swaplora_adapters.derive.whole_models.new_folder import share_files
from swaplora_adapters.errors import InvalidAdapterError, UnsupportedAdapterError
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.fit.base import LayerShapes, LinearShape
from swaplora_adapters.intake import inspect_files
from swaplora_adapters.store.records import Details
from swaplora_adapters.train.recipe import ALL_LINEAR, Recipe
from swaplora_adapters.weights.load import load_weights

_CONTINUED = frozenset({"lora", "dora", "rslora"})
_CPU = torch.device("cpu")


class TrainingError(ValueError):
    """What keeps a training run from beginning or from going on."""


def load_base(source: str | Path, recipe: Recipe, device: torch.device) -> Any:
    """The base as it is trained on: in fp32 on a CPU, else in bf16, with `--qlora` its linears in 4 bits.

    Raises TrainingError for a base that cannot be trained, OSError and ValueError for one that cannot be loaded.
    """
    config = AutoConfig.from_pretrained(source)
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise TrainingError(
            f"the base is quantised ({method}): train on the original, and with qlora to have it in 4 bits meanwhile"
        )
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if not recipe.qlora:
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device)
    if find_spec("bitsandbytes") is None:
        raise TrainingError("qlora needs bitsandbytes: install swaplora[quantized]")
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=quantized, device_map=device)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def with_adapter(base: Any, recipe: Recipe) -> Any:
    """The base with a new adapter, or with the one to go on from, which is to have passed `check_continued`."""
    if recipe.init_from is not None:
        return PeftModel.from_pretrained(base, str(recipe.init_from), is_trainable=True)
    names = {path.rpartition(".")[2] for path, _ in _linears(base)}
    if missing := [name for name in recipe.target if name not in names and recipe.target != (ALL_LINEAR,)]:
        raise TrainingError(f"target: no linear is called {', '.join(missing)}; there are {', '.join(sorted(names))}")
    is_transposed = any(isinstance(module, Conv1D) for _, module in _linears(base))
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.scaled_alpha,
        lora_dropout=recipe.dropout,
        target_modules=ALL_LINEAR if recipe.target == (ALL_LINEAR,) else list(recipe.target),
        use_dora=recipe.dora,
        use_rslora=recipe.rslora,
        fan_in_fan_out=is_transposed,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(recipe.seed)
    return get_peft_model(base, config)


def check_continued(folder: Path, base: Any, base_id: str) -> Details:
    """What there is to say of an adapter to go on from. Raises InvalidAdapterError with every reason against it."""
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if others := [kind for kind in read_spec(config).kinds if kind not in _CONTINUED]:
        raise UnsupportedAdapterError([f"an adapter of kind {kind} is not trained on here" for kind in others])
    try:
        return inspect_files(config, weights, _shapes(base), base_model=base_id).details
    except InvalidAdapterError as error:
        raise InvalidAdapterError(
            [f"{folder.name} does not fit {base_id}: {reason}" for reason in error.reasons]
        ) from None


def num_intruders(folder: Path, base: Any, source: str | Path) -> int | None:
    """Directions of an adapter that the base did not have, over all modules; None where they cannot be told."""
    if "dora" in read_spec(folder / CONFIG_FILE).kinds:
        return None
    files = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    weights = load_weights("", *files, _shapes(base), torch.float32, _CPU)
    counts = count_intruders(weights, source).values()
    return None if None in counts else sum(count or 0 for count in counts)


def digest_of_base(source: str | Path) -> str | None:
    """sha256 over its files of weights, each by name and by sha256; None where it has no safetensors files."""
    paths, whole = BaseFiles(source).paths, hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            whole.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{whole.hexdigest()}" if paths else None


def save_adapter(model: Any, folder: Path, source: str | Path, base_id: str) -> None:
    """The two files, in the number format of the base's own, naming it by its id in the place of where it lies."""
    dtype = AutoConfig.from_pretrained(source).dtype or torch.float32
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    model.peft_config["default"].base_model_name_or_path = base_id
    model.save_pretrained(folder, save_embedding_layers=False)
    share_files(folder)


def _linears(base: Any) -> Iterator[tuple[str, nn.Module]]:
    for path, module in base.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield path, module


def _shapes(base: Any) -> LayerShapes:
    """Of a base that no adapter is on."""
    linears = {}
    for path, module in _linears(base):
        sizes = (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
        linears[path] = LinearShape(*map(int, sizes))
    return LayerShapes(linears)
