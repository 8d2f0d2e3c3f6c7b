"""Whether a file holds exactly what its config and the base ask for; every complaint at once."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from swaplora_adapters.config.matching import Matcher
from swaplora_adapters.config.spec import ADALORA, HEAD_TASKS, AdapterSpec
from swaplora_adapters.errors import InvalidAdapterError
from swaplora_adapters.files.complaints import capped, quoted
from swaplora_adapters.fit.base import BaseLayers
from swaplora_adapters.fit.headless import with_whole_paths
from swaplora_adapters.fit.heads import head_complaints, head_reason, head_slots
from swaplora_adapters.fit.legacy_names import probes, with_current_names
from swaplora_adapters.fit.slots import Slot, find_slots, parameter_shapes, pieces_of, pooled
from swaplora_adapters.fit.spellings import PREFIX, misspelling, with_current_spelling
from swaplora_adapters.fit.targets import Targets, find_targets, paths_of

Shapes = Mapping[str, tuple[int, ...]]
_FACTOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_[AB]\.weight")
_EXPERT = re.compile(r".+\.experts\.\d+\.\w+")
# What a name would need of the config to be read.
_KINDS: Sequence[tuple[re.Pattern[str], str]] = [
    (re.compile(r".*\.lora_embedding_[AB]"), "embedding among its targets"),
    (re.compile(r".*\.lora_magnitude_vector(\..*)?"), "use_dora"),
    (re.compile(r".*\.lora_B\.bias"), "lora_bias"),
    (re.compile(r".*\.(lora_E|lora_A|lora_B)"), "peft_type ADALORA"),
    (re.compile(r".*\.modules_to_save\..*"), "modules_to_save"),
    (re.compile(r".*\.trainable_tokens_(delta|original)"), "trainable_token_indices"),
]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each tensor of a file that fits belongs."""

    spec: AdapterSpec
    layers: BaseLayers
    targets: Targets
    slots: Mapping[str, Sequence[Slot]]  # by name; an embedding's trained tokens are a tied head's as well

    @property
    def kinds(self) -> tuple[str, ...]:
        """What kinds the adapter is of, the factors' own first; plain LoRA is ("lora",)."""
        return (*self.spec.kinds, *(("embedding",) if self.targets.embeddings else ()))

    def tokens_of(self, path: str) -> tuple[int, ...]:
        """The tokens with rows of their own, in the file's order."""
        return self.targets.tokens[self.targets.tied_tokens.get(path, path)]


def fitted(spec: AdapterSpec, layers: BaseLayers, found: Shapes, max_work: int | None = None) -> Layout:
    """`found` are the shapes of the file's tensors by name, `max_work` the bound for patterns that come in.

    Raises InvalidAdapterError with every complaint.
    """
    spelled = with_current_spelling(found, layers.legacy_names)
    spec, spelled = with_whole_paths(spec, spelled, layers)
    found = {name: found[written] for name, written in spelled.items()}
    matcher = Matcher([*paths_of(layers), *probes(layers)], max_work)
    spec = with_current_names(spec, layers, found, matcher)
    targets = find_targets(spec, layers, matcher)
    slots: dict[str, list[Slot]] = defaultdict(list)
    for slot in chain(find_slots(spec, layers, targets, matcher), head_slots(spec, layers, found, matcher)):
        for written in _as_written(spec, slot, layers, found):
            slots[written.name].append(written)
    complaints = [*_stranger_complaints(spec, layers, slots, spelled), *targets.complaints]
    complaints += [*head_complaints(spec, layers, found), *_conflicts(spec, layers, targets)]
    complaints += _token_complaints(spec, layers, targets)
    complaints += _slot_complaints(slots, found)
    if not any(name in slots or _FACTOR_NAME.fullmatch(name) for name in found):
        complaints.append("the file holds no LoRA factors")
    if complaints:
        raise InvalidAdapterError(capped(list(dict.fromkeys(complaints))))
    return Layout(spec, layers, targets, {spelled[name]: uses for name, uses in slots.items() if name in found})


def _as_written(spec: AdapterSpec, slot: Slot, layers: BaseLayers, found: Shapes) -> Sequence[Slot]:
    """The slots of what the file has in place of one tensor, itself as a rule."""
    pieces = [] if slot.name in found else pieces_of(slot, layers)
    if any(piece.name in found for piece in pieces):
        return pieces
    return [pooled(spec, slot, found.get(slot.name, ())) if spec.use_qalora else slot]


def _stranger_complaints(
    spec: AdapterSpec, layers: BaseLayers, slots: Mapping[str, Sequence[Slot]], spelled: Mapping[str, str]
) -> Iterator[str]:
    return (_stranger_complaint(spec, layers, name, quoted(spelled[name])) for name in spelled if name not in slots)


def _stranger_complaint(spec: AdapterSpec, layers: BaseLayers, name: str, written: str) -> str:
    factor = _FACTOR_NAME.fullmatch(name)
    if factor is not None and factor["module"] in layers.linears:
        return f"{quoted(factor['module'])} is in the file, but the config does not target it"
    if reason := head_reason(spec, layers, name.removeprefix(PREFIX), None if factor is None else factor["module"]):
        return f"{written} {reason}"
    if reason := misspelling(name):
        return f"{written} {reason}"
    if factor is not None:
        return f"{quoted(factor['module'])} {_no_linear(layers, factor['module'])}"
    for pattern, needed in _KINDS:
        if pattern.fullmatch(name):
            return f"{written} is in the file, but the config has no {needed}"
    return f"{written} is no name of a LoRA factor (base_model.model.<module>.lora_A.weight, or lora_B)"


def _no_linear(layers: BaseLayers, path: str) -> str:
    if layers.legacy_names is None or not _EXPERT.fullmatch(path):
        reason = "is no linear layer of the base model"
        is_pooler = path.startswith(f"{layers.root}.pooler.")
        return f"{reason}, which has no pooler: leave it out with exclude_modules" if is_pooler else reason
    names = ", ".join(layers.legacy_names.parameters)
    return f"is now one with others in the base: PEFT reads it only with a config that targets {names}"


def _slot_complaints(slots: Mapping[str, Sequence[Slot]], found: Shapes) -> Iterator[str]:
    """By module: one of which the file has nothing is named once."""
    required: dict[str, list[Slot]] = defaultdict(list)
    for uses in slots.values():
        for slot in uses:
            if slot.is_required:
                required[slot.path].append(slot)
            if slot.name in found and found[slot.name] != slot.shape:
                yield _shape_complaint(slot, found[slot.name])
    for path, wanted in required.items():
        missing = [slot for slot in wanted if slot.name not in found]
        if path in HEAD_TASKS:
            names = (quoted(slot.name.removeprefix(PREFIX)) for slot in missing)
            yield from (f"the head of {path} has no {name}: have modules_to_save name its module" for name in names)
        elif len(missing) == len(wanted):
            yield f"{quoted(path)} is targeted, but not in the file"
        else:
            yield from (f"{quoted(path)} has no {slot.label}" for slot in missing)


def _shape_complaint(slot: Slot, shape: tuple[int, ...]) -> str:
    path = quoted(slot.path)
    if slot.part in ("copy.weight", "parameter.weight") and len(shape) == 2 == len(slot.shape):
        (rows, width), (base_rows, base_width) = shape, slot.shape
        if rows > base_rows and width == base_width:
            return (
                f"{path} has {slot.label} of {rows} rows, {rows - base_rows} more than the base's {base_rows}: "
                "tokens that were added to the vocabulary cannot be served"
            )
    return f"{path} has {slot.label} of shape {list(shape)}, {slot.needed_by} need {list(slot.shape)}"


def _conflicts(spec: AdapterSpec, layers: BaseLayers, targets: Targets) -> Iterator[str]:
    """What PEFT cannot put together on one module."""
    wrapped = {target.path for target in targets.parameters}
    followers = set(targets.tied_tokens)
    yield from _both(wrapped & targets.linears, "target_parameters", "target_modules")
    yield from _both(wrapped & targets.embeddings, "target_parameters", "target_modules")
    yield from _both(wrapped & targets.saved.keys(), "target_parameters", "modules_to_save")
    yield from _both(wrapped & (targets.tokens.keys() | followers), "target_parameters", "trainable_token_indices")
    yield from _both(targets.embeddings & targets.tokens.keys(), "target_modules", "trainable_token_indices")
    yield from _both(targets.saved.keys() & (targets.tokens.keys() | followers), "modules_to_save", "trainable tokens")
    if spec.use_dora:
        yield from _both(targets.linears & (targets.tokens.keys() | followers), "use_dora", "trainable_token_indices")
    if spec.alora_invocation_tokens:
        paths = map(quoted, sorted(targets.linears & layers.of_distances))
        yield from (
            f"alora_invocation_tokens is not supported with {path}, which distances go through" for path in paths
        )
    if targets.embeddings:
        unfit = {
            "peft_type ADALORA": spec.peft_type == ADALORA,
            "alora_invocation_tokens": spec.alora_invocation_tokens,
            "lora_bias": spec.lora_bias,
        }
        yield from (f"{field} is not supported with an embedding as a target" for field in unfit if unfit[field])


def _both(paths: set[str] | frozenset[str], one: str, other: str) -> Iterator[str]:
    yield from (f"{quoted(path)} is named by both {one} and {other}" for path in sorted(paths))


def _token_complaints(spec: AdapterSpec, layers: BaseLayers, targets: Targets) -> Iterator[str]:
    vocab_size = max((shape.num_embeddings for shape in layers.embeddings.values()), default=None)
    if vocab_size is not None and any(token >= vocab_size for token in spec.alora_invocation_tokens):
        yield f"alora_invocation_tokens has {max(spec.alora_invocation_tokens)}, but the base has {vocab_size} tokens"
    for path, ids in targets.tokens.items():
        num_rows = parameter_shapes(layers, path)["weight"][0]
        if beyond := [token for token in ids if token >= num_rows]:
            yield (
                f"trainable_token_indices has {', '.join(map(str, beyond[:10]))}{' ...' if len(beyond) > 10 else ''}, "
                f"but {quoted(path)} of the base has {num_rows} rows"
            )
