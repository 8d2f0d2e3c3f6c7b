"""Every kind of adapter that PEFT saves is read into what its own modules compute, one by one, on random inputs."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import peft_kinds
from model_layers import layers_of
from peft_kinds import BASES, KINDS
from swaplora_adapters.errors import InvalidAdapterError
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.fit.base import BaseLayers
from swaplora_adapters.intake import inspect_files
from swaplora_adapters.weights.load import load_weights
from swaplora_adapters.weights.served import AdapterWeights, EmbeddingWeights, LinearWeights

CPU = torch.device("cpu")
# of PEFT's: a base stored with its embeddings, tied heads, biases that merging could not keep, Conv1D
pytestmark = pytest.mark.filterwarnings("ignore")
Bases = Callable[[str], Path]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """The folder of a base of `BASES`."""
    folder = tmp_path_factory.mktemp("bases")
    made = {name: peft_kinds.save_base(name, folder / name) for name in BASES}
    return made.__getitem__


@pytest.fixture(scope="module")
def adapter_of(base_of: Bases, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an adapter of `KINDS`, made once."""
    folder = tmp_path_factory.mktemp("kinds")

    def make(kind: str) -> Path:
        out = folder / kind.replace(" ", "-")
        return out if out.exists() else peft_kinds.make(kind, base_of(KINDS[kind].base), out, seed=1)

    return make


def plain(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def load(folder: Path, layers: BaseLayers, dtype: torch.dtype = torch.float32) -> AdapterWeights:
    return load_weights("d", folder / CONFIG_FILE, folder / WEIGHTS_FILE, layers, dtype, CPU)


def oracle(kind: str, base: Path, adapter: Path) -> nn.Module:
    """PEFT's model, whose modules have the base's paths."""
    model = plain(base)
    if kind == "qalora":
        wrapped = peft_kinds.wrapped(kind, base)
        pairs = load_file(adapter / WEIGHTS_FILE)
        state = {name.replace(".weight", ".default.weight"): tensor for name, tensor in pairs.items()}
        wrapped.load_state_dict(state, strict=False)
    else:
        wrapped = PeftModel.from_pretrained(model, str(adapter))
    found: nn.Module = wrapped.eval().base_model.model
    return found


@torch.no_grad()
def computed(weights: AdapterWeights, path: str, module: nn.Module, x: Tensor) -> Tensor:
    """What is made of the base's `module` at `path` for input `x`, by the formulas of `served`."""
    if path in weights.replaced:
        replaced: Tensor = weights.replaced[path](x)
        return replaced
    y: Tensor = module(x)
    if path in weights.embeddings:
        return looked_up(weights.embeddings[path], x, y)
    return projected(weights.modules[path], x, y) if path in weights.modules else y


def projected(part: LinearWeights, x: Tensor, y: Tensor) -> Tensor:
    y = y + x @ part.lora_A.T @ part.lora_B.T
    if part.column_scale is not None:
        y = y * part.column_scale
    return y if part.shift is None else y + part.shift


def looked_up(part: EmbeddingWeights, ids: Tensor, y: Tensor) -> Tensor:
    if part.token_ids is not None and part.token_rows is not None:
        for token, row in zip(part.token_ids, part.token_rows, strict=True):
            y = torch.where((ids == token).unsqueeze(-1), row, y)
    return y + part.lora_A[ids] @ part.lora_B.T


def inputs(layers: BaseLayers, path: str, module: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(len(path))
    if isinstance(module, nn.Embedding):
        return torch.arange(module.num_embeddings).unsqueeze(0)
    width = layers.linears[path].in_features if path in layers.linears else 32
    return torch.randn(1, 5, width, generator=generator)


def check_modules(kind: str, weights: AdapterWeights, model: PreTrainedModel, peft_model: nn.Module) -> set[str]:
    """Compare every linear, embedding and norm of the base; return the paths at which the adapter changes something."""
    layers, changed = layers_of(model), set()
    arguments = {"alora_offsets": [99]} if kind == "alora" else {}
    for path in (*layers.linears, *layers.embeddings, *layers.others):
        if path.endswith(
            ("experts", "mlp.gate")
        ):  # what these are given is the router's: the whole model compares them
            continue
        module = model.get_submodule(path)
        x, theirs = inputs(layers, path, module), peft_model.get_submodule(path)
        expected = theirs(x, **(arguments if hasattr(theirs, "lora_variant") else {}))
        ours = computed(weights, path, module, x)
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5, msg=partial("{}: {}".format, path))
        if (expected - module(x)).abs().max() > 0.01:
            changed.add(path)
    return changed


def serve(model: PreTrainedModel, weights: AdapterWeights) -> None:
    """Have the model's own modules compute as the adapter asks."""
    for path in (*weights.modules, *weights.embeddings):
        module = model.get_submodule(path)
        module.register_forward_hook(lambda _, args, y, path=path: _changed(weights, path, args[0], y))
    for path, replacement in weights.replaced.items():
        model.set_submodule(path, replacement)


def _changed(weights: AdapterWeights, path: str, x: Tensor, y: Tensor) -> Tensor:
    return (
        looked_up(weights.embeddings[path], x, y)
        if path in weights.embeddings
        else projected(weights.modules[path], x, y)
    )


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_module_and_the_model_of_them_compute_what_pefts_do(
    kind: str, base_of: Bases, adapter_of: Callable[[str], Path]
) -> None:
    base, adapter = base_of(KINDS[kind].base), adapter_of(kind)
    model = plain(base)
    weights = load(adapter, layers_of(model))
    peft_model = oracle(kind, base, adapter)
    changed = check_modules(kind, weights, model, peft_model)
    assert changed | set(weights.replaced) == {*weights.modules, *weights.embeddings, *weights.replaced}
    if kind != "alora":  # which the model alone does not know where to begin
        ids = torch.arange(3, 60).unsqueeze(0)
        before, expected = model(ids).logits, peft_model(ids).logits
        serve(model, weights)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert (before - expected).abs().max() > 0.1
    assert weights.invocation == tuple(KINDS[kind].fields.get("alora_invocation_tokens", ()))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_card_tells_is_what_is_in_memory(kind: str, base_of: Bases, adapter_of: Callable[[str], Path]) -> None:
    layers, folder = layers_of(plain(base_of(KINDS[kind].base))), adapter_of(kind)
    details = inspect_files(folder / CONFIG_FILE, folder / WEIGHTS_FILE, layers).details
    weights = load(folder, layers)
    assert details.kinds == KINDS[kind].kinds
    assert (details.rank, details.targets) == (weights.rank, weights.targets)
    assert details.num_parameters == weights.num_parameters
    assert details.warnings == ()
    assert weights.is_sum == (not {"dora", "modules_to_save", "alora"} & set(details.kinds) and is_added(weights))


def is_added(weights: AdapterWeights) -> bool:
    return not weights.replaced and all(part.token_ids is None for part in weights.embeddings.values())


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_all_but_scales_and_shifts_is_bfloat16(
    kind: str, base_of: Bases, adapter_of: Callable[[str], Path]
) -> None:
    weights = load(adapter_of(kind), layers_of(plain(base_of(KINDS[kind].base)).bfloat16()), torch.bfloat16)
    factors = [tensor for part in weights.modules.values() for tensor in (part.lora_A, part.lora_B)]
    factors += [tensor for part in weights.embeddings.values() for tensor in part.tensors if tensor.is_floating_point()]
    factors += [tensor for module in weights.replaced.values() for tensor in module.parameters()]
    assert {tensor.dtype for tensor in factors} == {torch.bfloat16}
    vectors = [tensor for part in weights.modules.values() for tensor in (part.column_scale, part.shift)]
    assert {tensor.dtype for tensor in vectors if tensor is not None} <= {torch.float32}


Change = Callable[[dict[str, Tensor], dict[str, Any]], object]
EMBEDDING = "base_model.model.model.embed_tokens"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[str, Change, str]] = {
    "magnitude missing": (
        "dora",
        lambda t, _: t.pop(f"{Q_PROJ}.lora_magnitude_vector"),
        "has no lora_magnitude_vector",
    ),
    "magnitude of another size": (
        "dora",
        lambda t, _: t.update({f"{Q_PROJ}.lora_magnitude_vector": torch.ones(3)}),
        "lora_magnitude_vector of shape [3], the base need [32]",
    ),
    "magnitude not finite": (
        "dora",
        lambda t, _: t[f"{Q_PROJ}.lora_magnitude_vector"].fill_(torch.inf),
        "lora_magnitude_vector' holds NaN or infinity",
    ),
    "singular values missing": ("adalora", lambda t, _: t.pop(f"{Q_PROJ}.lora_E"), "has no lora_E"),
    "half an embedding": ("embedding", lambda t, _: t.pop(f"{EMBEDDING}.lora_embedding_B"), "has no lora_embedding_B"),
    "another base's embedding": (
        "embedding",
        lambda t, _: t[f"{EMBEDDING}.base_layer.weight"][5].add_(1),
        "embed_tokens.base_layer.weight' is not the base's own",
    ),
    "a larger vocabulary": (
        "embedding",
        lambda t, _: t.update({f"{EMBEDDING}.base_layer.weight": torch.zeros(262, 32)}),
        "base_layer.weight of 262 rows, 3 more than the base's 259",
    ),
    "a larger saved embedding": (
        "saved embedding",
        lambda t, _: t.update({f"{EMBEDDING}.weight": torch.zeros(300, 32)}),
        "weight of 300 rows, 41 more than the base's 259",
    ),
    "a saved module missing": (
        "saved norms",
        lambda t, _: t.pop("base_model.model.model.norm.weight"),
        "'model.norm' is targeted, but not in the file",
    ),
    "a classifier": (
        "plain",
        lambda _, c: c.update(modules_to_save=["score"]),
        "'score', which the base model has not",
    ),
    "a token beyond the base": (
        "tokens",
        lambda _, c: c.update(trainable_token_indices=[3, 259, 1000]),
        "trainable_token_indices has 259, 1000, but 'model.embed_tokens' of the base has 259 rows",
    ),
    "fewer rows than tokens": (
        "tokens",
        lambda _, c: c.update(trainable_token_indices=[3, 4]),
        "of shape [3, 32], 2 trainable_token_indices and the base need [2, 32]",
    ),
    "a token twice": ("tokens", lambda _, c: c.update(trainable_token_indices=[3, 3, 4]), "lists a token twice"),
    "a bias that the base has not": (
        "lora_only",
        lambda t, _: t.update({f"{Q_PROJ.replace('q_proj', 'o_proj')}.bias": torch.ones(32)}),
        "o_proj.bias' is no name of a LoRA factor",
    ),
    "a bias under a linear without": (
        "all biases",
        lambda t, _: t.update({f"{Q_PROJ.replace('q_proj', 'o_proj')}.bias": torch.ones(32)}),
        "'model.layers.0.self_attn.o_proj' has a bias in the file, but none in the base",
    ),
    "two biases that differ": (
        "saved norm with biases",
        lambda t, _: t["base_model.model.transformer.ln_f.modules_to_save.bias"].add_(1),
        "ln_f.modules_to_save.bias' is not the bias that the file has for 'transformer.ln_f'",
    ),
    "an expert's factor missing": (
        "experts",
        lambda t, _: t.pop("base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"),
        "has no base_layer.lora_A.weight",
    ),
    "a parameter that the base has not": (
        "experts",
        lambda _, c: c["target_parameters"].append("experts.up_proj"),
        "'experts.up_proj', which the base model has not",
    ),
    "a parameter of one dimension": (
        "plain",
        lambda _, c: c.update(target_parameters=["norm.weight"]),
        "'model.norm.weight', which is no matrix",
    ),
    "factors and saved": (
        "saved head",
        lambda _, c: c.update(target_parameters=["lm_head.weight"]),
        "'lm_head' is named by both target_parameters and modules_to_save",
    ),
    "a token beyond, of an invocation": (
        "alora",
        lambda _, c: c.update(alora_invocation_tokens=[60, 259]),
        "alora_invocation_tokens has 259, but the base has 259 tokens",
    ),
}


@pytest.mark.parametrize(("kind", "change", "complaint"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused_by_name(
    kind: str,
    change: Change,
    complaint: str,
    tmp_path: Path,
    base_of: Bases,
    adapter_of: Callable[[str], Path],
) -> None:
    source, layers = adapter_of(kind), layers_of(plain(base_of(KINDS[kind].base)))
    tensors, config = load_file(source / WEIGHTS_FILE), json.loads((source / CONFIG_FILE).read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(InvalidAdapterError) as caught:
        inspect_files(tmp_path / CONFIG_FILE, tmp_path / WEIGHTS_FILE, layers)
    assert complaint in "\n".join(caught.value.reasons)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_copy_of_the_base_may_be_less_precise_than_the_base(
    dtype: torch.dtype, tmp_path: Path, base_of: Bases, adapter_of: Callable[[str], Path]
) -> None:
    source, layers = adapter_of("embedding"), layers_of(plain(base_of("llama")))
    tensors = load_file(source / WEIGHTS_FILE)
    tensors[f"{EMBEDDING}.base_layer.weight"] = tensors[f"{EMBEDDING}.base_layer.weight"].to(dtype)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    shutil.copy(source / CONFIG_FILE, tmp_path)
    assert load(tmp_path, layers).embeddings.keys() == {"model.embed_tokens"}


def test_an_untrained_adapter_of_every_kind_has_no_effect_or_says_whose_rows_it_holds(
    tmp_path: Path, base_of: Bases
) -> None:
    for kind in ("plain", "lora_only", "all biases, norms", "dora", "adalora", "qalora", "embedding", "lora_bias"):
        base = base_of(KINDS[kind].base)
        folder = tmp_path / kind
        peft_kinds.wrapped(kind, base).save_pretrained(folder)
        details = inspect_files(folder / CONFIG_FILE, folder / WEIGHTS_FILE, layers_of(plain(base))).details
        assert details.warnings == ("every lora_B is zero: the adapter changes nothing",), kind
