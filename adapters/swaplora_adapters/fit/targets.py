"""Which modules of a base a config adapts or saves, by PEFT's rules."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from swaplora_adapters.config.matching import Matcher, path_ends
from swaplora_adapters.config.spec import HEAD_TASKS, AdapterSpec
from swaplora_adapters.files.complaints import quoted
from swaplora_adapters.fit.base import BaseLayers, HeadShapes

OUTPUT_HEADS = frozenset({"lm_head", "embed_out"})
# The names by which PEFT knows that tied weights are meant (`peft.utils.constants.EMBEDDING_LAYER_NAMES`).
_TIED_NAMES = frozenset({"embed_tokens", "lm_head"})


class TargetParameter(NamedTuple):
    """A parameter with factors of its own (`target_parameters`)."""

    path: str
    name: str

    @property
    def full_name(self) -> str:
        return f"{self.path}.{self.name}"


@dataclass(frozen=True, slots=True)
class Targets:
    """What of the base an adapter has tensors for, and what it asks for that the base has not."""

    linears: frozenset[str]  # with low-rank factors
    embeddings: frozenset[str]
    parameters: tuple[TargetParameter, ...]  # in the order in which PEFT wraps them, from the inside
    saved: Mapping[str, str]  # path of a module → the module that is saved whole, itself or one around it
    tokens: Mapping[str, tuple[int, ...]]  # path → trained tokens, in the file's order
    tied_tokens: Mapping[str, str]  # an output head → the embedding whose trained tokens are its own as well
    complaints: tuple[str, ...]


def paths_of(layers: BaseLayers) -> Iterator[str]:
    """All that patterns of a config are matched against."""
    yield from (*layers.linears, *layers.embeddings, *layers.others, *_TIED_NAMES)
    yield from dict.fromkeys(path for head in layers.heads.values() for path in head.linears)
    yield from (f"{path}.{name}" for path, sizes in _parameter_sizes(layers) for name in sizes)


def find_targets(spec: AdapterSpec, layers: BaseLayers, matcher: Matcher) -> Targets:
    """`matcher` is one of `paths_of`. Raises InvalidAdapterError when patterns are too much work to match."""
    complaints: list[str] = []
    head = head_of(spec, layers)
    lacking = frozenset() if head is None else head.lacks
    linears = {path for path in layers.linears if path not in lacking and is_targeted(spec, path, matcher)}
    embeddings = {path for path in layers.embeddings if not spec.is_all_linear and spec.targets(path, matcher)}
    saved = dict(_saved(spec, layers, complaints))
    tokens, tied_tokens = _tokens(spec, layers, complaints)
    heads = {path for path in layers.tied if spec.ensure_weight_tying}
    if any(_last(name) in _TIED_NAMES for name in spec.modules_to_save):
        linears -= heads
        saved |= {path: path for head in heads for path in (head, layers.tied[head])}
    elif _targets_tied_names(spec, matcher):
        linears |= heads
        embeddings |= {layers.tied[head] for head in heads}
    parameters = tuple(_parameters(spec, layers, complaints))
    return Targets(frozenset(linears), frozenset(embeddings), parameters, saved, tokens, tied_tokens, tuple(complaints))


def is_targeted(spec: AdapterSpec, path: str, matcher: Matcher) -> bool:
    """PEFT's all-linear leaves the output head out; it is known by the names that transformers gives it."""
    is_left_out = spec.is_all_linear and _last(path) in OUTPUT_HEADS
    return not is_left_out and spec.targets(path, matcher)


def head_of(spec: AdapterSpec, layers: BaseLayers) -> HeadShapes | None:
    """What the adapter's task asks for behind the base, if it asks for anything and the base has a place for it."""
    return layers.heads.get(spec.task_type) if spec.task_type in HEAD_TASKS else None


def is_head_name(name: str, spec: AdapterSpec, layers: BaseLayers) -> bool:
    """Whether `modules_to_save` means a part of the head by it. PEFT lists its own two names whichever there is."""
    head = head_of(spec, layers)
    if head is None:
        return False
    return name in ("classifier", "score") or any(name in full.split(".")[:-1] for full in head.shapes)


def _targets_tied_names(spec: AdapterSpec, matcher: Matcher) -> bool:
    """`peft.tuners.tuners_utils.BaseTuner._check_tied_modules`."""
    if isinstance(spec.target_modules, str):
        return any(matcher.is_fullmatch("target_modules", spec.target_modules, name) for name in _TIED_NAMES)
    return any(_last(name) in _TIED_NAMES for name in spec.target_modules)


def _saved(spec: AdapterSpec, layers: BaseLayers, complaints: list[str]) -> Iterator[tuple[str, str]]:
    """Every module that is saved, or lies in one that is: a name stands for all paths that end in it, dot or not."""
    found = set()
    for path in (*layers.linears, *layers.embeddings, *layers.others) if spec.modules_to_save else ():
        for whole in _parents(path):
            names = [name for name in spec.modules_to_save if whole.endswith(name)]
            found.update(names)
            if names:
                yield path, whole
                break
    names = [name for name in spec.modules_to_save if not is_head_name(name, spec, layers)]
    complaints += _not_found("modules_to_save", names, found)


def _parents(path: str) -> Iterator[str]:
    """From the outermost module to the path itself."""
    for position, char in enumerate(path):
        if char == ".":
            yield path[:position]
    yield path


def _tokens(
    spec: AdapterSpec, layers: BaseLayers, complaints: list[str]
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """By path, and the heads that follow an embedding (`peft.utils.other.set_additional_trainable_modules`)."""
    given = {name: ids for name, ids in spec.trainable_token_indices if ids}
    tokens: dict[str, tuple[int, ...]] = {}
    for name, ids in given.items():
        paths = _paths_of_tokens(name, layers)
        tokens |= dict.fromkeys(paths, ids)
        if not paths:
            shown = quoted(name) if name else "the input embedding"
            complaints.append(f"trainable_token_indices: the base model has no module {shown}")
    tied: dict[str, str] = {}
    for head, embedding in layers.tied.items():
        if embedding in tokens and tokens.get(head, tokens[embedding]) == tokens[embedding]:
            tokens.pop(head, None)
            tied[head] = embedding
        elif embedding in tokens and spec.ensure_weight_tying:
            complaints.append("trainable_token_indices differ between tied modules, which ensure_weight_tying forbids")
    return tokens, tied


def _paths_of_tokens(name: str, layers: BaseLayers) -> list[str]:
    """PEFT takes a list without a name for the input embedding."""
    if name:
        return [path for path in (*layers.embeddings, *layers.linears) if path.endswith(name)]
    return list(dict.fromkeys(layers.tied.values()))[:1] or list(layers.embeddings)[:1]


def _parameters(spec: AdapterSpec, layers: BaseLayers, complaints: list[str]) -> Iterator[TargetParameter]:
    found: set[str] = set()
    for path, sizes in _parameter_sizes(layers) if spec.target_parameters else ():
        for name, num_dimensions in sizes.items():
            ends = spec.target_parameters & path_ends(f"{path}.{name}")
            found |= ends
            if ends and num_dimensions in (2, 3):
                yield TargetParameter(path, name)
            elif ends:
                complaints.append(f"target_parameters names {quoted(f'{path}.{name}')}, which is no matrix nor several")
    complaints += _not_found("target_parameters", sorted(spec.target_parameters), found)


def _parameter_sizes(layers: BaseLayers) -> Iterator[tuple[str, dict[str, int]]]:
    """How many dimensions each parameter has that factors could be for, by module."""
    for path in (*layers.linears, *layers.embeddings):
        yield path, {"weight": 2}
    for path, shapes in layers.others.items():
        yield path, {name: len(shape) for name, shape in shapes.items()}


def _not_found(field: str, names: Iterable[str], found: set[str]) -> list[str]:
    return [f"{field} names {quoted(name)}, which the base model has not" for name in names if name not in found]


def _last(path: str) -> str:
    return path.rpartition(".")[2]
