"""A stand-alone model of a base and some adapters: W' = W + Σ s B A in float32, kept in the base's own format.

PEFT's `merge_and_unload` rounds after each of several adapters, and changes the embedding with a tied head.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from swaplora_adapters.config.parse import read_spec
from swaplora_adapters.derive.compose import Ingredient
from swaplora_adapters.derive.recipe import require_deltas
from swaplora_adapters.derive.whole_models.new_folder import new_folder, require_new
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.fit.base import BaseLayers, LayerShapes
from swaplora_adapters.fit.module_shape import shape_of
from swaplora_adapters.intake import inspect_files
from swaplora_adapters.weights.load import load_weights
from swaplora_adapters.weights.served import AdapterWeights


def export_model(base: str | Path, folders: Sequence[Path], scales: Sequence[float], out: Path) -> None:
    """Write the model, its config and its tokenizer into `out`, which appears whole or not at all.

    `scales` say how much of the adapter in each folder; any sign.

    Raises InvalidAdapterError for an adapter that does not fit the base or cannot be merged, ValueError and OSError for
    a base that cannot be loaded, and FileExistsError if `out` is there and not empty.
    """
    require_new(out)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    layers = LayerShapes({path: shape_of(module) for path, module in linears.items()})
    ingredients = [Ingredient(_checked(f, layers), s) for f, s in zip(folders, scales, strict=True)]
    _untie(model, ingredients, linears)
    for path, linear in linears.items():
        parts = [(i.weights.modules[path], i.scale) for i in ingredients if path in i.weights.modules]
        if parts:
            _add(linear, sum((scale * (part.lora_B @ part.lora_A) for part, scale in parts), torch.zeros(())))
    with new_folder(out) as folder:
        model.save_pretrained(folder, max_shard_size="4GB")
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def _checked(folder: Path, layers: BaseLayers) -> AdapterWeights:
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    require_deltas(read_spec(config))
    digest = inspect_files(config, weights, layers).digest
    return load_weights(digest, config, weights, layers, torch.float32, torch.device("cpu"))


def _untie(model: PreTrainedModel, ingredients: Sequence[Ingredient], linears: Mapping[str, nn.Module]) -> None:
    """Give a tied output head a weight of its own if an adapter changes it: the embedding is not to change with it."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    changed = {path for ingredient in ingredients for path in ingredient.weights.modules}
    if head is not None and head.weight is embedding.weight and any(linears[path] is head for path in changed):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False


@torch.no_grad()
def _add(linear: nn.Module, delta: torch.Tensor) -> None:
    weight = linear.weight
    assert isinstance(weight, nn.Parameter)
    weight.copy_(weight.float() + (delta.T if isinstance(linear, Conv1D) else delta))
