"""An adapter_config.json read: one frozen object of everything it says, and what cannot be honoured refused by name.

The rules are those of PEFT's LoraConfig and AdaLoraConfig, whose defaults hold for fields that are absent.
"""

from pathlib import Path
from typing import Any

from swaplora_adapters.config.fields import ConfigFields
from swaplora_adapters.config.refusals import BIASES, refuse_unserved
from swaplora_adapters.config.spec import ADALORA, LORA, AdapterSpec
from swaplora_adapters.errors import InvalidAdapterError, UnsupportedAdapterError
from swaplora_adapters.files.complaints import quoted
from swaplora_adapters.files.disk import read_bounded
from swaplora_adapters.files.naming import CONFIG_FILE
from swaplora_adapters.files.strict_json import loads

MAX_CONFIG_BYTES = 1 << 20
MAX_CONFIG_DEPTH = 16
MAX_RANK = 4096
MAX_ALPHA = 1e6
MAX_GROUP_SIZE = 1 << 20
MAX_BASE_NAME_CHARS = 1024

# No effect on the output of a trained adapter: how it was trained, what made it, or a knob of a switch that is off.
IGNORED_FIELDS = frozenset(
    {
        "auto_mapping",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "revision",
        "runtime_config",
    }
)
# The same, of initialisations that are over, of PEFT's first versions and of ms-swift: whoever gave them may think that
# they still matter, so that the card names them.
INERT_FIELDS = frozenset(
    {
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),
        *("merge_weights", "lora_dtype", "lorap_emb_lr", "lorap_lr_ratio", "swift_type"),
    }
)
# AdaLoRA's schedule; its `r` is not read either, `init_r` stands in its place.
ADALORA_IGNORED_FIELDS = frozenset(
    {"beta1", "beta2", "deltaT", "orth_reg_weight", "r", "target_r", "tfinal", "tinit", "total_step"}
)
# Kinds that `derive.convert` turns into LoRA.
CONVERTIBLE_KINDS = frozenset({"FOURIERFT", "LOHA", "LOKR", "VERA"})


def read_spec(path: Path) -> AdapterSpec:
    """Read an adapter_config.json from the disk. Raises what `parse_spec` does, also for a file that is too long."""
    return parse_spec(read_bounded(path, MAX_CONFIG_BYTES))


def parse_spec(raw: bytes) -> AdapterSpec:
    """Read the bytes of an adapter_config.json.

    Raises InvalidAdapterError with every complaint, or UnsupportedAdapterError if the config is well formed but
    asks for something that is not served.
    """
    document = loads(raw, what=CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES, max_depth=MAX_CONFIG_DEPTH)
    if not isinstance(document, dict):
        raise InvalidAdapterError([f"{CONFIG_FILE} must be a JSON object"])
    _require_lora(document)
    fields = ConfigFields(document)
    spec = _spec_of(fields)
    fields.finish()
    return spec


def _spec_of(fields: ConfigFields) -> AdapterSpec:
    is_adalora = fields.get("peft_type") == ADALORA
    spec = AdapterSpec(
        peft_type=ADALORA if is_adalora else LORA,
        r=fields.integer("init_r", 12, 1, MAX_RANK) if is_adalora else fields.integer("r", 8, 1, MAX_RANK),
        lora_alpha=fields.number("lora_alpha", 8.0, MAX_ALPHA),
        use_rslora=fields.boolean("use_rslora"),
        rank_pattern=_ranks_left(fields) if is_adalora else fields.ranks_by_pattern("rank_pattern", 1, MAX_RANK),
        alpha_pattern=fields.numbers_by_pattern("alpha_pattern", MAX_ALPHA),
        target_modules=_folded_case(fields.names("target_modules")),
        exclude_modules=fields.names("exclude_modules"),
        layers_to_transform=fields.layers("layers_to_transform"),
        layers_pattern=fields.patterns("layers_pattern"),
        fan_in_fan_out=fields.boolean("fan_in_fan_out"),
        base_model_name_or_path=fields.text("base_model_name_or_path", MAX_BASE_NAME_CHARS),
        task_type=fields.text("task_type", 64),
        bias=fields.choice("bias", BIASES),
        lora_bias=fields.boolean("lora_bias"),
        use_dora=fields.boolean("use_dora"),
        use_qalora=fields.boolean("use_qalora"),
        qalora_group_size=_group_size(fields),
        alora_invocation_tokens=fields.token_ids("alora_invocation_tokens"),
        modules_to_save=fields.plain_names("modules_to_save"),
        trainable_token_indices=fields.token_ids_by_module("trainable_token_indices"),
        target_parameters=frozenset(fields.plain_names("target_parameters")),
        ensure_weight_tying=fields.boolean("ensure_weight_tying"),
        materialise=fields.boolean("materialise"),
        id2label=fields.labels("id2label"),
        inert=fields.given(INERT_FIELDS),
    )
    refuse_unserved(fields, spec)
    fields.refuse_the_rest(IGNORED_FIELDS | (ADALORA_IGNORED_FIELDS if is_adalora else frozenset()))
    return spec


def _require_lora(document: dict[str, Any]) -> None:
    """Other kinds give the same field names other meanings, so nothing else is read of them."""
    kind = document.get("peft_type")
    if not isinstance(kind, str):
        raise InvalidAdapterError(["peft_type must be a string, and LORA or ADALORA to be served"])
    if kind not in (LORA, ADALORA):
        remedy = "; upload it with ?convert=svd to have it converted" if kind in CONVERTIBLE_KINDS else ""
        raise UnsupportedAdapterError([f"peft_type {quoted(kind)} is not supported, only LORA and ADALORA are{remedy}"])


def _ranks_left(fields: ConfigFields) -> tuple[tuple[str, int], ...]:
    """AdaLoRA's masks are named after the singular values that they keep, `<module path>.lora_E`."""
    return tuple((name.rpartition(".")[0], sum(mask)) for name, mask in fields.masks("rank_pattern"))


def _group_size(fields: ConfigFields) -> int:
    is_given = fields.get("qalora_group_size") is not None
    return fields.integer("qalora_group_size", 16, 1, MAX_GROUP_SIZE) if is_given else 16


def _folded_case(names: frozenset[str] | str) -> frozenset[str] | str:
    """PEFT reads the word all-linear in any case."""
    return "all-linear" if isinstance(names, str) and names.lower() == "all-linear" else names
