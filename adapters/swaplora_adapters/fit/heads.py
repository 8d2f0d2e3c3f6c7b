"""Heads that adapters bring for tasks of their own, with as many labels as they like: what a file must hold of one."""

from collections.abc import Iterator, Mapping

from swaplora_adapters.config.spec import HEAD_TASKS, AdapterSpec
from swaplora_adapters.files.complaints import quoted
from swaplora_adapters.fit.base import BaseLayers, HeadShapes
from swaplora_adapters.fit.slots import Slot
from swaplora_adapters.fit.spellings import PREFIX
from swaplora_adapters.fit.targets import head_of

Shapes = Mapping[str, tuple[int, ...]]


def head_slots(spec: AdapterSpec, layers: BaseLayers, found: Shapes) -> Iterator[Slot]:
    """A slot for each of its parameters; `found` are the shapes in the file, which say how many labels there are."""
    head = head_of(spec, layers)
    if head is None or spec.task_type is None:
        return
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
        yield f"task_type {quoted(spec.task_type)} needs a head, for which this base has no place"
    elif head is not None:
        num_labels = _num_labels(head, found)
        if spec.id2label and num_labels and len(spec.id2label) != num_labels:
            yield f"id2label has {len(spec.id2label)} names, and the file's head has {num_labels} labels"


def _num_labels(head: HeadShapes, found: Shapes) -> int:
    """By the first parameter that tells; 0 where none does."""
    for name, shape in head.shapes.items():
        stored = found.get(f"{PREFIX}{name}")
        if None in shape and stored is not None and len(stored) == len(shape):
            return stored[shape.index(None)]
    return 0
