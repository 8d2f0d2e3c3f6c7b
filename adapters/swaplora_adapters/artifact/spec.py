"""What an adapter_config.json says: read once into a frozen object, everything that cannot be honoured refused by name.

The rules are those of PEFT's LoraConfig, whose defaults hold for fields that are absent.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from swaplora_adapters.artifact.complaints import quoted
from swaplora_adapters.artifact.config_fields import ConfigFields
from swaplora_adapters.artifact.matching import Matcher, path_ends
from swaplora_adapters.artifact.names import CONFIG_FILE
from swaplora_adapters.artifact.strict_json import loads
from swaplora_adapters.errors import InvalidAdapterError, UnsupportedAdapterError

MAX_CONFIG_BYTES = 1 << 20
MAX_CONFIG_DEPTH = 16
MAX_RANK = 4096
MAX_ALPHA = 1e6
MAX_BASE_NAME_CHARS = 1024

# No effect on the output of a trained adapter: how it was trained, what made it, or a knob of a switch that is off.
IGNORED_FIELDS = frozenset(
    {
        "auto_mapping",
        "eva_config",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)
# Kinds that `derive.convert` turns into LoRA.
CONVERTIBLE_KINDS = frozenset({"FOURIERFT", "LOHA", "LOKR", "VERA"})
# These start from the base's weights as they are. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA start by changing them.
HARMLESS_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """One LoRA adapter's config. Patterns keep the file's order, because the first that matches wins."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    target_modules: frozenset[str] | str
    exclude_modules: frozenset[str] | str
    layers_to_transform: frozenset[int]
    layers_pattern: tuple[str, ...]
    fan_in_fan_out: bool
    base_model_name_or_path: str | None
    task_type: str | None

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
        fields.get("peft_type")
        spec = cls(
            r=fields.integer("r", 8, 1, MAX_RANK),
            lora_alpha=fields.number("lora_alpha", 8.0, MAX_ALPHA),
            use_rslora=fields.boolean("use_rslora"),
            rank_pattern=fields.ranks_by_pattern("rank_pattern", 1, MAX_RANK),
            alpha_pattern=fields.numbers_by_pattern("alpha_pattern", MAX_ALPHA),
            target_modules=_folded_case(fields.names("target_modules")),
            exclude_modules=fields.names("exclude_modules"),
            layers_to_transform=fields.layers("layers_to_transform"),
            layers_pattern=fields.patterns("layers_pattern"),
            fan_in_fan_out=fields.boolean("fan_in_fan_out"),
            base_model_name_or_path=fields.text("base_model_name_or_path", MAX_BASE_NAME_CHARS),
            task_type=fields.text("task_type", 64),
        )
        _check_targets(fields, spec)
        _refuse_values(fields, spec)
        fields.refuse_the_rest(IGNORED_FIELDS)
        return spec

    @property
    def is_all_linear(self) -> bool:
        """Whether the targets are every linear layer but the output head, which no name alone can tell."""
        return self.target_modules == "all-linear"

    def rank_of(self, module: str, matcher: Matcher | None = None) -> int:
        """The rank that the module's factors must have; pass a `matcher` to bound many calls together."""
        return (matcher or Matcher()).value_for("rank_pattern", self.rank_pattern, module, self.r)

    def alpha_of(self, module: str, matcher: Matcher | None = None) -> float:
        """The module's alpha, before it is divided by its rank."""
        return (matcher or Matcher()).value_for("alpha_pattern", self.alpha_pattern, module, self.lora_alpha)

    def scaling_of(self, module: str, matcher: Matcher | None = None) -> float:
        """What B·A is multiplied by: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv:2312.03732)."""
        rank = self.rank_of(module, matcher)
        return self.alpha_of(module, matcher) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str, matcher: Matcher | None = None) -> bool:
        """Whether a linear layer at this path is adapted (`peft.tuners.tuners_utils.check_target_module_exists`).

        With `is_all_linear` that is every module not excluded; the caller leaves out the output head.
        """
        matcher = matcher or Matcher()
        if self._excludes(module, matcher):
            return False
        if isinstance(self.target_modules, str):
            return self.is_all_linear or matcher.is_fullmatch("target_modules", self.target_modules, module)
        if module in self.target_modules:
            return True
        return _lists_end(self.target_modules, module) and self._is_in_chosen_layer(module, matcher)

    def _excludes(self, module: str, matcher: Matcher) -> bool:
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
        and all that `parse` ignores. A field served later must appear only where it is not at its default, so that
        digests stay what they are.
        """
        meaning = {
            "alpha_pattern": self.alpha_pattern,
            "exclude_modules": _listed(self.exclude_modules),
            "layers_pattern": self.layers_pattern,
            "layers_to_transform": sorted(self.layers_to_transform),
            "lora_alpha": self.lora_alpha,
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": self.rank_pattern,
            "target_modules": _listed(self.target_modules),
            "use_rslora": self.use_rslora,
        }
        return json.dumps(meaning, sort_keys=True, separators=(",", ":")).encode()


def _require_lora(document: dict[str, Any]) -> None:
    """Other kinds give the same field names other meanings, so nothing else is read of them."""
    kind = document.get("peft_type")
    if not isinstance(kind, str):
        raise InvalidAdapterError(["peft_type must be a string, and LORA to be served"])
    if kind != "LORA":
        remedy = "; upload it with ?convert=svd to have it converted" if kind in CONVERTIBLE_KINDS else ""
        raise UnsupportedAdapterError([f"peft_type {quoted(kind)} is not supported, only LORA is{remedy}"])


def _check_targets(fields: ConfigFields, spec: AdapterSpec) -> None:
    if not spec.target_modules:
        fields.malformed.append("target_modules names nothing")
    if isinstance(spec.target_modules, str) and (spec.layers_to_transform or spec.layers_pattern):
        fields.malformed.append("layers_to_transform and layers_pattern need target_modules to be a list")
    if spec.layers_pattern and not spec.layers_to_transform:
        fields.malformed.append("layers_pattern needs layers_to_transform")


def _refuse_values(fields: ConfigFields, spec: AdapterSpec) -> None:
    """Note the values of known fields that are not served."""
    if spec.task_type not in (None, "CAUSAL_LM"):
        fields.unsupported.append(f"task_type {quoted(spec.task_type)} is not supported, only CAUSAL_LM is")
    if (bias := fields.get("bias", "none")) != "none":
        fields.unsupported.append(f"bias {quoted(str(bias))} is not supported, only none is")
    init = fields.get("init_lora_weights", True)
    if not (isinstance(init, bool) or init is None or (isinstance(init, str) and init.lower() in HARMLESS_INITS)):
        fields.unsupported.append(
            f"init_lora_weights {quoted(str(init))} is not supported: such an adapter fits only the base it changed. "
            "Save it again with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _folded_case(names: frozenset[str] | str) -> frozenset[str] | str:
    """PEFT reads the word all-linear in any case."""
    return "all-linear" if isinstance(names, str) and names.lower() == "all-linear" else names


def _lists_end(names: frozenset[str], module: str) -> bool:
    """Whether `names` has the path or anything that follows one of its dots."""
    return any(end in names for end in path_ends(module))


def _listed(names: frozenset[str] | str) -> list[str] | str:
    return names if isinstance(names, str) else sorted(names)
