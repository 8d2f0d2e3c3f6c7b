"""What an adapter_config.json says, and PEFT's rules for which modules it means: targets, ranks, alphas, scalings."""

import json
import math
from dataclasses import dataclass, field

from swaplora_adapters.config.matching import Matcher, path_ends

LORA, ADALORA = "LORA", "ADALORA"
HEAD_TASKS = frozenset({"SEQ_CLS", "TOKEN_CLS"})  # whose adapters bring a head of their own


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
    id2label: tuple[str, ...]  # not PEFT's: the names of a head's labels, in their order; none where they have none
    inert: tuple[str, ...] = field(default=(), compare=False)  # fields that say something, but not of the output

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
        and all that parsing ignores. What plain LoRA does not use appears only where it is not at its default, so that
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
            "id2label": self.id2label,
            "task_type": self.task_type if self.task_type in HEAD_TASKS else "",
        }
        meaning |= {field: value for field, value in kinds.items() if value}
        return json.dumps(meaning, sort_keys=True, separators=(",", ":")).encode()


def _lists_end(names: frozenset[str], module: str) -> bool:
    """Whether `names` has the path or anything that follows one of its dots."""
    return not names.isdisjoint(path_ends(module))


def _listed(names: frozenset[str] | str) -> list[str] | str:
    return names if isinstance(names, str) else sorted(names)
