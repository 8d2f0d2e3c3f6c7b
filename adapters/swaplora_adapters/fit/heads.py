"""Heads that adapters bring for tasks of their own, with as many labels as they like: what a file must hold of one."""

from collections.abc import Iterator, Mapping

from swaplora_adapters.config.matching import Matcher
from swaplora_adapters.config.spec import ADALORA, HEAD_TASKS, AdapterSpec
from swaplora_adapters.files.complaints import quoted
from swaplora_adapters.fit.base import BaseLayers, HeadShapes
from swaplora_adapters.fit.slots import Slot
from swaplora_adapters.fit.spellings import PREFIX
from swaplora_adapters.fit.targets import head_of, is_targeted

Shapes = Mapping[str, tuple[int, ...]]


def head_slots(spec: AdapterSpec, layers: BaseLayers, found: Shapes, matcher: Matcher) -> Iterator[Slot]:
    """A slot for each of its parameters; `found` are the shapes in the file, which say how many labels there are.

    Linears of the head that the base has itself may have factors instead.
    """
    head = head_of(spec, layers)
    if head is None or spec.task_type is None:
        return
    for path in head.linears:
        if _has_factors(spec, head, path, found) and is_targeted(spec, path, matcher):
            yield from _factors(spec, spec.task_type, path, head, matcher)
    num_labels = _num_labels(head, found)
    for name, shape in head.shapes.items():
        sizes = tuple(num_labels if size is None else size for size in shape)
        why = f"{num_labels} labels and the base" if None in shape else "the base"
        full = f"{PREFIX}{name}"
        yield Slot(spec.task_type, f"parameter.{name}", full, sizes, why, is_required=name not in head.given)


def head_complaints(spec: AdapterSpec, layers: BaseLayers, found: Shapes) -> Iterator[str]:
    """A task without a place in the base, and labels whose names do not fit their number."""
    head = head_of(spec, layers)
    if spec.task_type in HEAD_TASKS and head is None:
        yield f"task_type {quoted(spec.task_type)} needs a head, for which this base has no place{_reason(layers)}"
    elif head is not None:
        num_labels = _num_labels(head, found)
        if spec.id2label and num_labels and len(spec.id2label) != num_labels:
            yield f"id2label has {len(spec.id2label)} names, and the file's head has {num_labels} labels"


def head_reason(spec: AdapterSpec, layers: BaseLayers, name: str, module: str | None) -> str | None:
    """Why a tensor has no place that is a head's by its name, or a factor of its `module`; None where it is not."""
    task = next((task for task, head in layers.heads.items() if name in head.shapes), None)
    if task is not None:
        return f"is of a head of task_type {task}, and the config's is {spec.task_type}"
    task = next((task for task, head in layers.heads.items() if module in head.linears), None)
    return None if task is None else f"is a factor in the head of {task}: have modules_to_save name the module instead"


def _reason(layers: BaseLayers) -> str:
    """Decoders have heads for whole inputs alone."""
    return ": of a base that generates, the last token's state alone is read" if layers.heads else ""


def _has_factors(spec: AdapterSpec, head: HeadShapes, path: str, found: Shapes) -> bool:
    is_plain = not (spec.peft_type == ADALORA or spec.use_dora or spec.lora_bias or spec.use_qalora)
    return is_plain and f"{path}.weight" in head.given and f"{PREFIX}{path}.weight" not in found


def _factors(spec: AdapterSpec, task: str, path: str, head: HeadShapes, matcher: Matcher) -> Iterator[Slot]:
    rank, shape = spec.rank_of(path, matcher), head.linears[path]
    why, name = f"rank {rank} and the base", f"{PREFIX}{path}.lora_"
    yield Slot(task, f"lora_A.{path}", f"{name}A.weight", (rank, shape.in_features), why)
    scaling = spec.scaling_of(path, matcher)
    yield Slot(task, f"lora_B.{path}", f"{name}B.weight", (shape.out_features, rank), why, scaling=scaling)


def _num_labels(head: HeadShapes, found: Shapes) -> int:
    """By the first parameter that tells; 0 where none does."""
    for name, shape in head.shapes.items():
        stored = found.get(f"{PREFIX}{name}")
        if None in shape and stored is not None and len(stored) == len(shape):
            return stored[shape.index(None)]
    return 0
