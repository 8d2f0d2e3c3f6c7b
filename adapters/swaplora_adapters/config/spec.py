"""What an adapter_config.json says: read once into a frozen object, everything that cannot be honoured refused by name.

The rules are those of PEFT's LoraConfig and AdaLoraConfig, whose defaults hold for fields that are absent.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Any

from swaplora_adapters.config.fields import ConfigFields
from swaplora_adapters.config.matching import Matcher, path_ends
from swaplora_adapters.config.refusals import BIASES, refuse_unserved
from swaplora_adapters.errors import InvalidAdapterError, UnsupportedAdapterError
from swaplora_adapters.files.complaints import quoted
from swaplora_adapters.files.names import CONFIG_FILE
from swaplora_adapters.files.strict_json import loads

MAX_CONFIG_BYTES = 1 << 20
MAX_CONFIG_DEPTH = 16
MAX_RANK = 4096
MAX_ALPHA = 1e6
MAX_GROUP_SIZE = 1 << 20
MAX_BASE_NAME_CHARS = 1024
LORA, ADALORA = "LORA", "ADALORA"

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


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """One adapter's config. Patterns keep the file's order, because the first that matches wins."""

    peft_type: str  # LORA or ADALORA
    r: int  # of AdaLoRA: init_r
    lora_alpha: float
    use_rslora: bool
    rank_pattern: tuple[tuple[str, int], ...]  # of AdaLoRA: the rank that is left, by module path
    alpha_pattern: tuple[tuple[str, float], ...]
    target_modules: frozenset[str] | str
    exclude_modules: frozenset[str] | str
    layers_to_transform: frozenset[int]
    layers_pattern: tuple[str, ...]
    fan_in_fan_out: bool
    base_model_name_or_path: str | None
    task_type: str | None
    bias: str
    lora_bias: bool
    use_dora: bool
    use_qalora: bool
    qalora_group_size: int
    alora_invocation_tokens: tuple[int, ...]
    modules_to_save: tuple[str, ...]
    trainable_token_indices: tuple[tuple[str, tuple[int, ...]], ...]  # by module name, "" is the input embedding
    target_parameters: frozenset[str]
    ensure_weight_tying: bool
    materialise: bool  # not PEFT's: serve it merged into weights of its own
    inert: tuple[str, ...] = field(default=(), compare=False)  # fields that say something, but not of the output

    @classmethod
    def parse(cls, raw: bytes) -> "AdapterSpec":
        """Read the bytes of an adapter_config.json.

        Raises InvalidAdapterError with every complaint, or UnsupportedAdapterError if the config is well formed but
        asks for something that is not served.
        """
        document = loads(raw, what=CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES, max_depth=MAX_CONFIG_DEPTH)
        if not isinstance(document, dict):
            raise InvalidAdapterError([f"{CONFIG_FILE} must be a JSON object"])
        _require_lora(document)
        fields = ConfigFields(document)
        spec = cls._read(fields)
        fields.finish()
        return spec

    @classmethod
    def _read(cls, fields: ConfigFields) -> "AdapterSpec":
        is_adalora = fields.get("peft_type") == ADALORA
        spec = cls(
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
            inert=fields.given(INERT_FIELDS),
        )
        refuse_unserved(fields, spec)
        fields.refuse_the_rest(IGNORED_FIELDS | (ADALORA_IGNORED_FIELDS if is_adalora else frozenset()))
        return spec

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the config alone tells of the kinds of the adapter, the factors' own first; plain LoRA is ("lora",)."""
        marks = {
            "dora": self.use_dora,
            "alora": self.alora_invocation_tokens,
            "bias": self.lora_bias or self.bias != "none",
            "modules_to_save": self.modules_to_save,
            "trainable_tokens": self.trainable_token_indices,
            "target_parameters": self.target_parameters,
            "merged": self.materialise,
        }
        factors = "adalora" if self.peft_type == ADALORA else "qalora" if self.use_qalora else "lora"
        return (factors, *(kind for kind, is_so in marks.items() if is_so))

    @property
    def is_all_linear(self) -> bool:
        """Whether the targets are every linear layer but the output head, which no name alone can tell."""
        return self.target_modules == "all-linear"

    def rank_of(self, module: str, matcher: Matcher | None = None) -> int:
        """The rank that the module's factors must have; pass a `matcher` of all modules for many calls.

        A parameter that is itself a target (`target_parameters`) is asked for by its full name.
        """
        matcher = matcher or Matcher([module])
        if self.peft_type == ADALORA:
            return matcher.exact_value_for("rank_pattern", self.rank_pattern, module, self.r)
        return matcher.value_for("rank_pattern", self.rank_pattern, module, self.r)

    def alpha_of(self, module: str, matcher: Matcher | None = None) -> float:
        """The module's alpha, before it is divided by its rank."""
        return (matcher or Matcher([module])).value_for("alpha_pattern", self.alpha_pattern, module, self.lora_alpha)

    def scaling_of(self, module: str, matcher: Matcher | None = None) -> float:
        """What B·A is multiplied by: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv:2312.03732).

        Of AdaLoRA, alpha over the rank that training began with (`peft.tuners.adalora.layer.SVDLinear.forward`).
        """
        rank = self.rank_of(module, matcher)
        if self.peft_type == ADALORA:
            return (self.lora_alpha if self.lora_alpha > 0 else rank) / (self.r + 1e-5)
        return self.alpha_of(module, matcher) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str, matcher: Matcher | None = None) -> bool:
        """Whether a linear layer at this path is adapted (`peft.tuners.tuners_utils.check_target_module_exists`).

        With `is_all_linear` that is every module not excluded; the caller leaves out the output head.
        """
        matcher = matcher or Matcher([module])
        if self._excludes(module, matcher):
            return False
        if isinstance(self.target_modules, str):
            return self.is_all_linear or matcher.is_fullmatch("target_modules", self.target_modules, module)
        if module in self.target_modules:
            return True
        return _lists_end(self.target_modules, module) and self._is_in_chosen_layer(module, matcher)

    def _excludes(self, module: str, matcher: Matcher) -> bool:
        if any(matcher.is_fullmatch("modules_to_save", rf"(.*\.)?{m}(\..*)?", module) for m in self.modules_to_save):
            return True
        if isinstance(self.exclude_modules, str):
            return matcher.is_fullmatch("exclude_modules", self.exclude_modules, module)
        return _lists_end(self.exclude_modules, module)

    def _is_in_chosen_layer(self, module: str, matcher: Matcher) -> bool:
        if not self.layers_to_transform:
            return True
        return matcher.layer_index("layers_pattern", self.layers_pattern, module) in self.layers_to_transform

    @property
    def canonical(self) -> bytes:
        """The meaning as canonical JSON: equal bytes beside equal tensors give equal outputs, and fit the same bases.

        Left out is what changes neither: the base's name, the task, `fan_in_fan_out` (how the base stores its weight),
        and all that `parse` ignores. What plain LoRA does not use appears only where it is not at its default, so that
        digests stay what they are.
        """
        meaning: dict[str, object] = {
            "alpha_pattern": self.alpha_pattern,
            "exclude_modules": _listed(self.exclude_modules),
            "layers_pattern": self.layers_pattern,
            "layers_to_transform": sorted(self.layers_to_transform),
            "lora_alpha": self.lora_alpha,
            "peft_type": self.peft_type,
            "r": self.r,
            "rank_pattern": self.rank_pattern,
            "target_modules": _listed(self.target_modules),
            "use_rslora": self.use_rslora,
        }
        kinds: dict[str, object] = {
            "alora_invocation_tokens": self.alora_invocation_tokens,
            "bias": "" if self.bias == "none" else self.bias,
            "ensure_weight_tying": self.ensure_weight_tying,
            "lora_bias": self.lora_bias,
            "materialise": self.materialise,
            "modules_to_save": self.modules_to_save,
            "qalora_group_size": self.use_qalora and self.qalora_group_size,
            "target_parameters": sorted(self.target_parameters),
            "trainable_token_indices": self.trainable_token_indices,
            "use_dora": self.use_dora,
        }
        meaning |= {field: value for field, value in kinds.items() if value}
        return json.dumps(meaning, sort_keys=True, separators=(",", ":")).encode()


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


def _lists_end(names: frozenset[str], module: str) -> bool:
    """Whether `names` has the path or anything that follows one of its dots."""
    return any(end in names for end in path_ends(module))


def _listed(names: frozenset[str] | str) -> list[str] | str:
    return names if isinstance(names, str) else sorted(names)
