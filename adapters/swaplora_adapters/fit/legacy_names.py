"""Configs of adapters that were trained with transformers 4 on experts that version 5 has fused, brought up to date.

As PEFT does it (`peft.utils.transformers_weight_conversion`): the linears of each expert become a parameter of all, and
a router's linear a parameter of its own module.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from swaplora_adapters.config.matching import Matcher
from swaplora_adapters.config.spec import LORA, AdapterSpec
from swaplora_adapters.errors import InvalidAdapterError
from swaplora_adapters.files.complaints import quoted
from swaplora_adapters.fit.base import BaseLayers, LegacyNames
from swaplora_adapters.fit.spellings import PREFIX
from swaplora_adapters.fit.targets import is_targeted

_MIXTRAL = LegacyNames(
    ((".block_sparse_moe.", ".mlp."),),
    {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
)
_QWEN2 = LegacyNames(
    (), {"gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
)
# PEFT converts no other types, nor qwen2_moe itself.
_BY_TYPE: Mapping[str, LegacyNames] = dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _MIXTRAL) | dict.fromkeys(
    (
        *("afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe"),
        *("flex_olmo", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum"),
        *("olmoe", "qwen3_moe", "qwen3_next", "solar_open"),
    ),
    _QWEN2,
)


def legacy_names_of(model_type: str) -> LegacyNames | None:
    """Those of a base of transformers' `model_type`; None where PEFT reads none."""
    return _BY_TYPE.get(model_type)


def probes(layers: BaseLayers) -> Iterator[str]:
    """Paths that PEFT makes up of a base's, to see what a pattern of then targets."""
    return (linear.probe for linear in _linears_then(layers))


def with_current_names(spec: AdapterSpec, layers: BaseLayers, found: Collection[str], matcher: Matcher) -> AdapterSpec:
    """The config with parameters in place of linears that are none any more; `found` are the names in the file.

    Raises InvalidAdapterError where only a part of what is fused now is targeted.
    """
    if layers.legacy_names is None or spec.peft_type != LORA:
        return spec
    if isinstance(spec.target_modules, str):
        return _of_pattern(spec, layers, layers.legacy_names, found, matcher)
    then = {name for name in spec.target_modules if _last(name) in layers.legacy_names.parameters}
    parameters = {layers.legacy_names.parameters[_last(name)] for name in then}
    return _with_parameters(spec, layers.legacy_names, map(_last, then), spec.target_modules - then, parameters)


def _of_pattern(
    spec: AdapterSpec, layers: BaseLayers, legacy_names: LegacyNames, found: Collection[str], matcher: Matcher
) -> AdapterSpec:
    """PEFT gives parameters of all layers factors, which do nothing where the file has none."""
    paths = [*layers.linears, *(() if spec.is_all_linear else layers.embeddings)]
    targeted = {path for path in paths if is_targeted(spec, path, matcher)}
    then = {_last(path) for path in targeted} & legacy_names.parameters.keys()
    parameters = set()
    for linear in _linears_then(layers):
        if spec.targets(linear.probe, matcher):
            then.add(linear.name)
            if any(tensor.startswith(f"{PREFIX}{linear.path}.") for tensor in found):
                parameters.add(f"{linear.path}.{linear.parameter}")
    if not then:
        return spec
    remaining = frozenset(path for path in targeted if _last(path) not in legacy_names.parameters)
    return _with_parameters(spec, legacy_names, then, remaining, parameters)


class _LinearThen(NamedTuple):
    """A linear of then, or of all experts those of one name."""

    name: str  # its last
    probe: str  # what PEFT has a pattern match
    path: str  # of the module that it is in now
    parameter: str  # of that


def _linears_then(layers: BaseLayers) -> Iterator[_LinearThen]:
    for path, shapes in layers.others.items():
        for name, now in layers.legacy_names.parameters.items() if layers.legacy_names else ():
            module, _, parameter = now.rpartition(".")
            if parameter in shapes and module in ("", _last(path)):
                yield _LinearThen(name, path if module else f"{path}.{name}", path, parameter)


def _with_parameters(
    spec: AdapterSpec, legacy_names: LegacyNames, then: Iterable[str], modules: frozenset[str], parameters: set[str]
) -> AdapterSpec:
    """A parameter that several linears are in has all of their ranks together, at the same scaling but for rsLoRA's."""
    targeted, patterns = set(then), []
    for parameter in dict.fromkeys(legacy_names.parameters.values()):
        linears = legacy_names.linears_in(parameter)
        missing = [name for name in linears if name not in targeted]
        if len(linears) > len(missing) > 0:
            given = ", ".join(name for name in linears if name in targeted)
            complaint = f"target_modules has {given}, but not {', '.join(missing)}, and the base has both in one"
            raise InvalidAdapterError([f"{complaint}: {quoted(parameter)}"])
        if len(linears) > 1 and not missing:
            patterns.append((rf".*\.{re.escape(parameter)}", len(linears)))
    return replace(
        spec,
        target_modules=modules,
        target_parameters=spec.target_parameters | parameters,
        rank_pattern=spec.rank_pattern + tuple((pattern, spec.r * times) for pattern, times in patterns),
        alpha_pattern=spec.alpha_pattern + tuple((pattern, spec.lora_alpha * times) for pattern, times in patterns),
    )


def _last(path: str) -> str:
    return path.rpartition(".")[2]
