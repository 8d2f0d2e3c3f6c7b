"""What a well-formed adapter_config.json may ask for that is not served, or that PEFT itself does not put together."""

from swaplora_adapters.config.fields import ConfigFields
from swaplora_adapters.config.spec import ADALORA, HEAD_TASKS, AdapterSpec
from swaplora_adapters.files.complaints import quoted

# PEFT refuses them for AdaLoRA, or does not look at them.
_NOT_ADALORAS = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "lora_bias",
    "target_parameters",
    "use_dora",
    "use_qalora",
    "use_rslora",
)
# These start from the base's weights as they are. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA start by changing them.
HARMLESS_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
# Those of which PEFT makes plain LoRA again (`LoraModel._convert_state_dict_for_initial_model`).
CONVERTED_INITS = ("pissa", "corda", "olora", "lora_ga")
TASK_TYPES = ("CAUSAL_LM", "FEATURE_EXTRACTION", *sorted(HEAD_TASKS))
BIASES = ("none", "lora_only", "all")
# What PEFT does not compute, or computes before an aLoRA's invocation too, though that adapter is not at work there.
_EXCLUSIVE = (
    ("use_dora", ("alora_invocation_tokens", "lora_bias", "target_parameters", "use_qalora")),
    ("use_qalora", ("alora_invocation_tokens", "lora_bias", "target_parameters")),
    ("target_parameters", ("alora_invocation_tokens", "fan_in_fan_out", "lora_bias")),
    ("alora_invocation_tokens", ("modules_to_save", "trainable_token_indices")),
)


def refuse_unserved(fields: ConfigFields, spec: AdapterSpec) -> None:
    """Note every complaint about fields that were read."""
    _check_targets(fields, spec)
    _refuse_values(fields, spec)
    if spec.peft_type == ADALORA:
        given = [field for field in _NOT_ADALORAS if getattr(spec, field)]
        fields.unsupported += [f"{field} is not supported with peft_type ADALORA" for field in given]
    else:
        _refuse_combinations(fields, spec)


def _check_targets(fields: ConfigFields, spec: AdapterSpec) -> None:
    if not (spec.target_modules or spec.target_parameters):
        fields.malformed.append("target_modules names nothing")
    if isinstance(spec.target_modules, str) and (spec.layers_to_transform or spec.layers_pattern):
        fields.malformed.append("layers_to_transform and layers_pattern need target_modules to be a list")
    if spec.layers_pattern and not spec.layers_to_transform:
        fields.malformed.append("layers_pattern needs layers_to_transform")


def _refuse_values(fields: ConfigFields, spec: AdapterSpec) -> None:
    """Note the values of known fields that are not served."""
    if spec.task_type is not None and spec.task_type not in TASK_TYPES:
        known = ", ".join(TASK_TYPES)
        fields.unsupported.append(f"task_type {quoted(spec.task_type)} is not supported, {known} are")
    if spec.id2label and spec.task_type not in HEAD_TASKS:
        fields.unsupported.append("id2label names labels of a head, and only task_type SEQ_CLS and TOKEN_CLS have one")
    init = fields.get("init_lora_weights", True)
    if not (isinstance(init, bool) or init is None or (isinstance(init, str) and init.lower() in HARMLESS_INITS)):
        fields.unsupported.append(
            f"init_lora_weights {quoted(str(init))} is not supported: such an adapter fits only the base that it "
            f"changed. {_init_remedy(spec, str(init).lower())}"
        )
    if spec.use_qalora and spec.qalora_group_size == 1:
        fields.unsupported.append("qalora_group_size 1 is not supported: its factors look like plain LoRA's")


def _init_remedy(spec: AdapterSpec, init: str) -> str:
    """PEFT converts some, though not together with fields of which it cannot tell what was scaled how."""
    changed_base = "serve that changed base, saved with it, and set init_lora_weights to true"
    is_scaled_apart = spec.use_rslora and (spec.rank_pattern or spec.alpha_pattern)
    if not init.startswith(CONVERTED_INITS) or is_scaled_apart:
        return changed_base.capitalize()
    return (
        "Save it again with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), which takes the "
        f"adapter as it was before training, or {changed_base}"
    )


def _refuse_combinations(fields: ConfigFields, spec: AdapterSpec) -> None:
    """Note what does not go together."""
    for field, others in _EXCLUSIVE:
        given = [other for other in others if getattr(spec, field) and getattr(spec, other)]
        fields.unsupported += [f"{field} is not supported with {other}" for other in given]
    if spec.alora_invocation_tokens and spec.bias != "none":
        fields.unsupported.append(f"alora_invocation_tokens is not supported with bias {quoted(spec.bias)}")
