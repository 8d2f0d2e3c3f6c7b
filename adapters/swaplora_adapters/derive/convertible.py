"""Reading an adapter of another kind than LoRA, trusting nothing: config, header and fit come before values."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swaplora_adapters.config.fields import ConfigFields, says_something
from swaplora_adapters.config.matching import Matcher
from swaplora_adapters.config.parse import MAX_ALPHA, MAX_CONFIG_BYTES, MAX_CONFIG_DEPTH, parse_spec
from swaplora_adapters.config.patterns import MAX_WORK
from swaplora_adapters.config.spec import AdapterSpec
from swaplora_adapters.derive.kinds import KINDS, Kind, Module, Shapes
from swaplora_adapters.errors import InvalidAdapterError, UnsupportedAdapterError
from swaplora_adapters.files.complaints import capped, quoted
from swaplora_adapters.files.disk import raising_storage_errors, read_bounded
from swaplora_adapters.files.naming import CONFIG_FILE
from swaplora_adapters.files.strict_json import loads
from swaplora_adapters.files.tensorfile import Header, read_header
from swaplora_adapters.fit.base import LinearShape
from swaplora_adapters.fit.targets import is_targeted

_MAX_SEED = 2**63 - 1
_PREFIX = "base_model."
# What all kinds share with LoRA, and mean by it the same.
_COMMON = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode"),
        *("layers_pattern", "layers_to_transform", "modules_to_save", "peft_type", "peft_version", "r", "revision"),
        *("target_modules", "task_type"),
    }
)


@dataclass(frozen=True, slots=True)
class Convertible:
    """An adapter that fits the base: its kind, and per module what `kinds` needs to know and its tensors' names."""

    kind_name: str
    kind: Kind
    spec: AdapterSpec
    header: Header
    modules: Mapping[str, Module]
    names: Mapping[str, Mapping[str, str]]  # module → part → name in the file
    projection_seed: int | None  # of VeRA's projections, where they are not in the file


def read_convertible(config_path: Path, weights_path: Path, shapes: Mapping[str, LinearShape]) -> Convertible:
    """Raises InvalidAdapterError with every complaint of the first stage that has any, or UnsupportedAdapterError."""
    with raising_storage_errors():
        raw = read_bounded(config_path, MAX_CONFIG_BYTES)
        document = loads(raw, what=CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES, max_depth=MAX_CONFIG_DEPTH)
        name, kind = _kind_of(document)
        numbers = _Numbers(document, kind)
        spec = parse_spec(json.dumps(_as_lora(document, kind)).encode())
        header = read_header(weights_path)
    _require_factors_alone(spec)
    matcher = Matcher(shapes, MAX_WORK)
    targeted = {path: shape for path, shape in shapes.items() if is_targeted(spec, path, matcher)}
    modules = {path: numbers.module(spec, path, shape, matcher) for path, shape in targeted.items()}
    return _fitted(name, kind, spec, header, modules, numbers)


class _Numbers:
    """The fields of a kind that LoRA does not have."""

    def __init__(self, document: Mapping[str, Any], kind: Kind) -> None:
        fields = ConfigFields({**kind.defaults, **document})
        has = kind.defaults.keys()
        self.scaling = fields.number("scaling", 1.0, MAX_ALPHA) if "scaling" in has else None
        self.seed = fields.integer("random_loc_seed", 0, 0, _MAX_SEED) if "random_loc_seed" in has else 0
        seed = fields.integer("projection_prng_key", 0, 0, _MAX_SEED) if "projection_prng_key" in has else 0
        is_saved = fields.boolean("save_projection") if "save_projection" in has else True
        self.projection_seed = None if is_saved else seed
        fields.finish()

    def module(self, spec: AdapterSpec, path: str, shape: LinearShape, matcher: Matcher) -> Module:
        scaling = spec.scaling_of(path, matcher) if self.scaling is None else self.scaling
        return Module(shape, spec.rank_of(path, matcher), scaling, self.seed)


def _kind_of(document: object) -> tuple[str, Kind]:
    if not isinstance(document, dict) or not isinstance(document.get("peft_type"), str):
        raise InvalidAdapterError([f"{CONFIG_FILE} must be a JSON object with a peft_type"])
    name = document["peft_type"]
    if name == "LORA":
        raise InvalidAdapterError(["peft_type is LORA already: upload it without ?convert"])
    if name not in KINDS:
        raise UnsupportedAdapterError([f"peft_type {quoted(name)} cannot be converted, only {', '.join(KINDS)} can"])
    return name, KINDS[name]


def _as_lora(document: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """What the config says about targets, ranks and scaling, in LoRA's words; UnsupportedAdapterError for the rest."""
    shared = _COMMON | ({"rank_pattern", "alpha_pattern"} if kind.has_patterns else set())
    known = shared | kind.ignored | kind.defaults.keys()
    unsupported = [field for field, value in document.items() if field not in known and says_something(value)]
    if unsupported:
        raise UnsupportedAdapterError(
            capped([f"{quoted(field)} is not supported for this kind" for field in unsupported])
        )
    fields = {**kind.defaults, **document}
    lora = {field: value for field, value in fields.items() if field in shared} | {"peft_type": "LORA"}
    return lora | {"lora_alpha": fields.get("alpha", lora.get("r", 8))}


def _require_factors_alone(spec: AdapterSpec) -> None:
    """What LoRA may have besides its factors is not converted."""
    if spec.bias != "none":
        raise UnsupportedAdapterError([f"bias {quoted(spec.bias)} is not supported for this kind"])
    if spec.modules_to_save:
        raise UnsupportedAdapterError(["'modules_to_save' is not supported for this kind"])


def _fitted(
    name: str, kind: Kind, spec: AdapterSpec, header: Header, modules: Mapping[str, Module], numbers: _Numbers
) -> Convertible:
    """Raise unless every tensor has its place, and every targeted module all its tensors in the right shapes."""
    names, shared, unexpected = _sorted_names(header, kind)
    complaints = [f"{quoted(tensor)} is no name of a tensor of this kind" for tensor in unexpected]
    complaints += [
        f"{quoted(path)} is not targeted, or no linear layer of the base" for path in names if path not in modules
    ]
    found_shared = {part: header.tensors[tensor].shape for part, tensor in shared.items()}
    complaints += _shared_complaints(kind, found_shared, modules, numbers)
    for path, module in modules.items():
        found = {part: header.tensors[tensor].shape for part, tensor in names.get(path, {}).items()}
        complaints += [f"{quoted(path)} {text}" for text in kind.complaints(found, module)]
    if not modules:
        complaints.append("the config targets no linear layer of the base")
    if complaints:
        raise InvalidAdapterError(capped(complaints))
    every = {path: {**names[path], **shared} for path in modules}
    return Convertible(name, kind, spec, header, modules, every, numbers.projection_seed)


def _sorted_names(header: Header, kind: Kind) -> tuple[dict[str, dict[str, str]], dict[str, str], list[str]]:
    """Names by module and part, the shared ones by part, and those that are neither."""
    names: dict[str, dict[str, str]] = defaultdict(dict)
    shared, unexpected = {}, []
    for name in header.tensors:
        path, _, part = name.removeprefix(f"{_PREFIX}model.").rpartition(".")
        if name.startswith(_PREFIX) and name.removeprefix(_PREFIX) in kind.shared:
            shared[name.removeprefix(_PREFIX)] = name
        elif part in kind.parts and path and name.startswith(f"{_PREFIX}model."):
            names[path][part] = name
        else:
            unexpected.append(name)
    return dict(names), shared, unexpected


def _shared_complaints(kind: Kind, found: Shapes, modules: Mapping[str, Module], numbers: _Numbers) -> Iterator[str]:
    """About VeRA's projections, which are as large as the largest module wherever they come from."""
    if numbers.projection_seed is not None:
        if found:
            yield "save_projection is false, but the file holds the projections: set it to true to have them used"
        return
    expected = projection_shapes(modules) if kind.shared and modules else {}
    for part, shape in expected.items():
        if part not in found:
            yield f"{_PREFIX}{part} is missing, though the config says that it is saved"
        elif found[part] != shape:
            yield f"{_PREFIX}{part} is of shape {list(found[part])}, the rank and the base need {list(shape)}"


def projection_shapes(modules: Mapping[str, Module]) -> dict[str, tuple[int, int]]:
    """Of VeRA's projections, in the order in which PEFT draws them."""
    rank = max(module.rank for module in modules.values())
    return {
        "vera_A": (rank, max(module.shape.in_features for module in modules.values())),
        "vera_B": (max(module.shape.out_features for module in modules.values()), rank),
    }
