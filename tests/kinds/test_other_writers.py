"""What PEFT reads is served with the same numbers, whoever wrote it; what PEFT reads as nothing is refused."""

from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import transformers_weight_conversion as conversion
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS

import peft_kinds
import tiny
from kinds_batch import Company, gathered
from kinds_oracle import KindOracle
from kinds_table import Made
from model_layers import layers_of
from other_writers import (
    EXPERTS,
    SPELLINGS,
    expert_tensors,
    own_state,
    peft_logits,
    rewritten,
    save_experts,
    vector_weights,
)
from peft_kinds import KINDS
from serving import BASE, serving, settings
from swaplora_adapters.errors import InvalidAdapterError
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.fit.legacy_names import legacy_names_of
from swaplora_adapters.intake import inspect_files
from test_kinds_files import load, plain, serve

# of PEFT's: keys that it does not find, fields that it ignores
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(3, 60).unsqueeze(0)
REASONS = {
    "another adapter's": "has the adapter's name 'mine' in it",
    "without prefix": "lacks the prefix base_model.model.",
    "of DistributedDataParallel": "is a name of a wrapped model (module.)",
    "of FSDP": "is a name of a wrapped model (_fsdp_wrapped_module.)",
    "of FSDP's layers": "is a name of a wrapped model (_fsdp_wrapped_module.)",
    "of torch.compile": "is a name of a wrapped model (_orig_mod.)",
    "of a compiled base": "is a name of a wrapped model (_orig_mod.)",
}


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a base of `peft_kinds.BASES` or `EXPERTS`, made once."""
    folder, made = tmp_path_factory.mktemp("bases"), dict[str, Path]()

    def make(name: str) -> Path:
        if (name not in made and name in EXPERTS and name != "mixtral") or (name not in made and name == "mixtral"):
            made[name] = tiny.save_tiny_base(folder / name, {"model_type": name, **EXPERTS[name].fields})
        elif name not in made:
            made[name] = peft_kinds.save_base(name, folder / name)
        return made[name]

    return make


@torch.no_grad()
def served_logits(base: Path, adapter: Path) -> Tensor:
    """What the files are read into, at work in the base; InvalidAdapterError."""
    model = plain(base)
    layers = layers_of(model)
    inspect_files(adapter / CONFIG_FILE, adapter / WEIGHTS_FILE, layers)
    serve(model, load(adapter, layers))
    logits: Tensor = model(IDS).logits
    return logits


@torch.no_grad()
def check(base: Path, adapter: Path, full: Tensor | None = None) -> str:
    """Compare with PEFT where it reads the files, in full if `full` is given; else return why they are refused."""
    expected = peft_logits(base, adapter, IDS)
    if expected is not None and (full is None or torch.equal(expected, full)):
        assert (expected.log_softmax(-1) - plain(base)(IDS).logits.log_softmax(-1)).abs().max() > 0.5
        torch.testing.assert_close(served_logits(base, adapter), expected, rtol=1e-4, atol=1e-4)
        return ""
    with pytest.raises(InvalidAdapterError) as caught:
        served_logits(base, adapter)
    return "\n".join(caught.value.reasons)


READ = ("own state", "vectors as weights")
OF_ALL_KINDS = ("dora", "embedding", "adalora", "lora_bias", "saved head", "tokens")


@pytest.mark.parametrize(
    ("kind", "spelling"),
    [
        *(("plain", spelling) for spelling in SPELLINGS),
        *(
            (kind, spelling)
            for kind in OF_ALL_KINDS
            for spelling in (*READ[: 1 + (kind == "dora")], "another adapter's")
        ),
    ],
)
def test_names_are_read_where_peft_reads_them(
    kind: str, spelling: str, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_of(KINDS[kind].base)
    source = peft_kinds.make(kind, base, tmp_path / "source", seed=1)
    if kind == "adalora":
        strengthen(source)
    reason = check(base, rewritten(source, tmp_path / "other", SPELLINGS[spelling]), peft_logits(base, source, IDS))
    assert (reason == "") == (spelling in READ)
    assert REASONS.get(spelling, "") in reason


def strengthen(folder: Path) -> None:
    """Three times as strong, so that it moves what the base says by enough."""
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file(
        {name: 3 * tensor if "lora_E" in name else tensor for name, tensor in tensors.items()}, folder / WEIGHTS_FILE
    )


@pytest.mark.parametrize("rename", [own_state, vector_weights])
def test_one_tensor_under_two_names_is_refused(
    rename: Callable[[str], str], base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = peft_kinds.make("dora", base_of("qwen2"), tmp_path / "source", seed=1)
    tensors = load_file(source / WEIGHTS_FILE)
    name = next(name for name in tensors if rename(name) != name)
    save_file({**tensors, rename(name): tensors[name] * 2}, source / WEIGHTS_FILE)
    with pytest.raises(InvalidAdapterError, match="are two names of one tensor"):
        served_logits(base_of("qwen2"), source)


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
Case = tuple[list[str], Mapping[str, Any]]  # what the file has factors for, and the config


def cases(kind: str) -> dict[str, Case]:
    """Whether PEFT reads each of them, and reads all of it, it tells itself."""
    of, names = EXPERTS[kind], EXPERTS[kind].names
    listed = "|".join(names)
    dotted = ["self_attn.q_proj", *(f"experts.{name}" for name in names), f"{of.block}.gate"]
    as_parameters = {
        "target_parameters": ["gate_up_proj", "down_proj"],
        "rank_pattern": {"gate_up_proj": 8},
        "alpha_pattern": {"gate_up_proj": 16},
    }
    return {
        "experts": (["q_proj", *names], {"target_modules": ["q_proj", *names]}),
        "experts alone": (names, {"target_modules": names}),
        "down projections": (["q_proj", of.down], {"target_modules": ["q_proj", of.down]}),
        "router": (["q_proj", "gate"], {"target_modules": ["q_proj", "gate"]}),
        "all": ([*ATTENTION, "gate", *names], {"target_modules": [*ATTENTION, "gate", *names]}),
        "ends of paths": (["q_proj", "gate", *names], {"target_modules": dotted}),
        "regex": (["q_proj", *names], {"target_modules": rf".*\.(q_proj|{listed})"}),
        "regex for a router": (["q_proj", "gate"], {"target_modules": r".*\.(q_proj|gate)"}),
        "all-linear": ([*ATTENTION, "gate", *names], {"target_modules": "all-linear"}),
        "all-linear, experts": ([*ATTENTION, *names], {"target_modules": "all-linear"}),
        "rsLoRA": (["q_proj", *names], {"target_modules": ["q_proj", *names], "use_rslora": True}),
        "alpha pattern": (
            ["q_proj", *names],
            {"target_modules": ["q_proj", *names], "alpha_pattern": {"down_proj": 5, "q_proj": 3}},
        ),
        "as parameters": (["q_proj", *names], {"target_modules": ["q_proj"], **as_parameters}),
    }


@pytest.mark.parametrize(
    ("kind", "case"),
    [*(("mixtral", case) for case in cases("mixtral")), *((kind, "all") for kind in EXPERTS), ("olmoe", "regex")],
)
def test_experts_of_transformers_4_are_what_peft_makes_of_them(
    kind: str, case: str, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    targets, config = cases(kind)[case]
    assert check(base_of(kind), save_experts(tmp_path / "a", expert_tensors(kind, targets), **config)) == ""


@pytest.mark.parametrize("kind", EXPERTS)
def test_an_expert_projections_own_rank_counts(kind: str, base_of: Callable[[str], Path], tmp_path: Path) -> None:
    names = EXPERTS[kind].names
    tensors = expert_tensors(kind, ["q_proj", *names], {names[2]: 2})
    folder = save_experts(tmp_path / "a", tensors, target_modules=["q_proj", *names], rank_pattern={"down_proj": 2})
    assert check(base_of(kind), folder) == ""


@pytest.mark.parametrize("spelling", ["own state", "without prefix", "own state without prefix"])
def test_a_base_that_peft_renames_takes_names_without_prefix(
    spelling: str, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = save_experts(
        tmp_path / "a", expert_tensors("mixtral", ["q_proj", "gate"]), target_modules=["q_proj", "gate"]
    )
    folder = rewritten(source, tmp_path / "b", SPELLINGS[spelling])
    assert check(base_of("mixtral"), folder, peft_logits(base_of("mixtral"), source, IDS)) == ""


def test_what_peft_makes_nothing_of_is_refused(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    base, of = base_of("mixtral"), EXPERTS["mixtral"]
    whole = expert_tensors("mixtral", ["q_proj", *of.names])
    attention = peft_logits(base, save_experts(tmp_path / "q", whole, target_modules=["q_proj"]), IDS)
    assert attention is not None

    def reason(number: int, tensors: Mapping[str, Tensor], targets: Any) -> str:
        folder = save_experts(tmp_path / str(number), tensors, target_modules=targets)
        expected = peft_logits(base, folder, IDS)
        assert expected is None or torch.equal(expected, attention)
        return check(base, folder, torch.zeros(()))

    gate_up = {name: tensor for name, tensor in whole.items() if ".w2." not in name}
    without = {name: tensor for name, tensor in whole.items() if "experts.2.w1.lora_A" not in name}
    told = "PEFT reads it only with a config that targets gate, w1, w3, w2"
    assert told in reason(0, gate_up, ["q_proj", "w1", "w3"])
    assert told in reason(1, whole, r".*\.(q_proj|experts\.\d+\.w.)")
    assert "'model.layers.0.mlp.experts' has no 2.w1.lora_A.weight" in reason(2, without, ["q_proj", *of.names])
    assert "target_modules has w1, but not w3" in reason(3, whole, ["q_proj", "w1", "w2"])


def test_the_earlier_names_are_those_of_peft_and_transformers() -> None:
    families = {"mixtral": (".block_sparse_moe.", ".mlp."), "qwen2_moe": None}
    for model_type in CAUSAL_LMS:
        family = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type)  # noqa: SLF001
        is_converted = family in families and get_checkpoint_conversion_mapping(model_type) is not None
        legacy_names = legacy_names_of(model_type)
        if legacy_names is None:
            assert not is_converted or model_type in ("beam", "sarvam_mla"), model_type
        else:
            assert is_converted
            assert legacy_names.parameters == conversion._MOE_TARGET_MODULE_MAPPING[family]  # noqa: SLF001
            assert legacy_names.renamings == ((families[family],) if families[family] else ())


HALVES = (torch.bfloat16, torch.float16)
# Trained in, stored in, served in. Left out is what is rounded twice on one way and once on the other, and may differ.
ROUNDINGS = {*product(HALVES, (torch.float32, *HALVES), (torch.float32, torch.bfloat16))} - {
    (torch.float16, torch.bfloat16, torch.bfloat16)
}


@pytest.mark.parametrize(("half", "stored", "served"), sorted(ROUNDINGS, key=str))
@pytest.mark.parametrize("kind", ["embedding", "embedding and head"])
def test_a_copy_of_the_base_in_half_precision_is_the_bases_own_however_it_is_stored(
    kind: str,
    half: torch.dtype,
    stored: torch.dtype,
    served: torch.dtype,
    base_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    base = base_of("llama")
    source = peft_kinds.make(kind, base, tmp_path / "a", seed=1)
    tensors = load_file(source / WEIGHTS_FILE)
    copies = [name for name in tensors if "base_layer" in name]
    assert copies
    for name in copies:
        tensors[name] = tensors[name].to(half).to(stored)
    save_file(tensors, source / WEIGHTS_FILE)
    layers = layers_of(plain(base).to(served))
    assert load(source, layers, served).embeddings
    save_file({**tensors, copies[0]: tensors[copies[0]] + 0.02}, source / WEIGHTS_FILE)
    with pytest.raises(InvalidAdapterError, match="is not the base's own"):
        load(source, layers, served)


@pytest.mark.parametrize(
    "name", [None, "", "base", "org/base", "/models/base/", "C:\\models\\base", "C:\\models\\Base\\", "."]
)
def test_a_name_that_names_no_other_base_is_no_warning(
    name: str | None, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = peft_kinds.make("plain", base_of("llama"), tmp_path / "a", seed=1)
    tiny.edit_config(source, base_model_name_or_path=name)
    layers = layers_of(plain(base_of("llama")))
    paths = source / CONFIG_FILE, source / WEIGHTS_FILE
    assert inspect_files(*paths, layers, base_model="base").details.warnings == ()
    tiny.edit_config(source, base_model_name_or_path=r"C:\models\other")
    [warning] = inspect_files(*paths, layers, base_model="base").details.warnings
    assert "other" in warning


SWIFT: dict[str, Any] = {
    "swift_type": "LORA",
    "use_qa_lora": False,
    "use_merged_linear": False,
    "enable_lora": None,
    "lora_dtype": None,
    "lorap_lr_ratio": 16.0,
    "lorap_emb_lr": 1e-06,
    "model_key_mapping": None,
}
FIRST_PEFT: dict[str, Any] = {"lora_alpha": 8, "merge_weights": False, "enable_lora": None}  # versions 0.1 and 0.2


def made(kind: str, base: Path, folder: Path) -> Made:
    return Made(kind, folder, KindOracle(base, folder, "plain"))


def of_llama(base: Path, folder: Path) -> list[Made]:
    partner = tiny.save_adapter(folder / "partner", base, seed=9, target_modules=["k_proj", "o_proj"])
    written = {
        kind: peft_kinds.make(kind, base, folder / f"0 {kind}", seed=i)
        for i, kind in enumerate(KINDS)
        if kind in ("plain", "embedding", "dora, patterns", "adalora")
    }
    strengthen(written["adalora"])
    others = {
        "plain": rewritten(written["plain"], folder / "1", own_state),
        "embedding": rewritten(written["embedding"], folder / "2", own_state),
        "dora": rewritten(written["dora, patterns"], folder / "3", vector_weights),
        "dora, own state": rewritten(written["dora, patterns"], folder / "4", own_state),
        "adalora": rewritten(written["adalora"], folder / "5", own_state),
        "ms-swift": rewritten(written["plain"], folder / "6", **SWIFT),
        "first PEFT": rewritten(written["plain"], folder / "7", **FIRST_PEFT),
    }
    return [*(made(kind, base, path) for kind, path in others.items()), made("partner", base, partner)]


def of_experts(kind: str, base: Path, folder: Path) -> list[Made]:
    partner = tiny.save_adapter(folder / "partner", base, seed=9, target_modules=["k_proj", "o_proj"])
    written = {
        slugged: save_experts(folder / slugged, expert_tensors(kind, targets), **config)
        for slugged, (targets, config) in cases(kind).items()
        if slugged in ("experts", "router", "all", "regex")
    }
    return [made("partner", base, partner), *(made(name, base, path) for name, path in written.items())]


@pytest.mark.parametrize("base_kind", ["llama", "mixtral", "qwen3_moe"])
async def test_in_one_batch_each_says_what_peft_says_alone(
    base_kind: str, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_of(base_kind)
    served = of_llama(base, tmp_path) if base_kind == "llama" else of_experts(base_kind, base, tmp_path)
    company = Company(base, served, 24)
    with serving(settings(base, tmp_path / "data")) as running:
        company.upload(running)
        with gathered(running, len(company.members)) as steps:
            answers = await company.ask(running)
        if base_kind == "llama":
            warnings = running.client.get("/v1/adapters/ms-swift").json()["warnings"]
            told = ", ".join(sorted(field for field in SWIFT if SWIFT[field]))
            assert warnings[-1] == f"fields that matter to training alone are ignored: {told}"
            assert running.client.get("/v1/adapters/first-PEFT").json()["warnings"] == warnings[:-1]
    assert steps.most == len(company.members)
    assert company.wrong(answers) == set()
    assert company.unmoved(answers) == {BASE}
    swapped = dict(zip(answers, [*list(answers.values())[1:], answers[BASE]], strict=True))
    assert company.wrong(swapped) == set(swapped), "a neighbour's answer must show"
