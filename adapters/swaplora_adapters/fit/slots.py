"""What an adapter's file must hold: a slot for every tensor, by the config and the base, and by PEFT's names."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from swaplora_adapters.config.matching import Matcher
from swaplora_adapters.config.spec import ADALORA, AdapterSpec
from swaplora_adapters.fit.base import BaseLayers, EmbeddingShape, LinearShape
from swaplora_adapters.fit.spellings import PREFIX
from swaplora_adapters.fit.targets import OUTPUT_HEADS, TargetParameter, Targets


class Slot(NamedTuple):
    """One tensor's place, and what becomes of it there."""

    path: str  # of the module
    part: str  # of what is built for the module
    name: str  # in the file, as a rule behind the module's path
    shape: tuple[int, ...]  # in the file
    needed_by: str = "the base"
    is_required: bool = True
    is_transposed: bool = False  # in the file
    scaling: float = 1.0
    num_repeats: int = 1  # of each column
    whole: "Slot | None" = None  # what this is but a piece of
    piece: tuple[int, int] = (0, 0)  # of that: the expert, and which of its linears

    @classmethod
    def of(cls, path: str, part: str, name: str, shape: tuple[int, ...], *rest: Any, **options: Any) -> "Slot":
        """A slot whose name is `name` behind the module's path."""
        return cls(path, part, f"{PREFIX}{path}.{name}", shape, *rest, **options)

    @property
    def label(self) -> str:
        """The name without what all tensors of the module share."""
        return self.name.removeprefix(f"{PREFIX}{self.path}.")


def find_slots(spec: AdapterSpec, layers: BaseLayers, targets: Targets, matcher: Matcher) -> Iterator[Slot]:
    """Every slot, those of one module one after the other."""
    for path, shape in layers.linears.items():
        if path in targets.linears:
            yield from _linear(spec, path, shape, matcher)
    for path, embedding in layers.embeddings.items():
        if path in targets.embeddings:
            yield from _embedding(spec, path, embedding, matcher)
    for path, whole in targets.saved.items():
        yield from _saved(spec, layers, path, whole)
    yield from _tokens(layers, targets)
    yield from _target_parameters(spec, layers, targets, matcher)
    if spec.bias != "none":
        yield from _biases(spec, layers, targets)
    yield from _copies(layers, targets)


def _linear(spec: AdapterSpec, path: str, shape: LinearShape, matcher: Matcher) -> Iterator[Slot]:
    rank, scaling = spec.rank_of(path, matcher), spec.scaling_of(path, matcher)
    why = f"rank {rank} and the base"
    if spec.peft_type == ADALORA:
        yield Slot.of(path, "lora_A", "lora_A", (rank, shape.in_features), why)
        yield Slot.of(path, "lora_E", "lora_E", (rank, 1), why)
        yield Slot.of(path, "lora_B", "lora_B", (shape.out_features, rank), why, scaling=scaling)
        return
    yield Slot.of(path, "lora_A", "lora_A.weight", (rank, shape.in_features), why)
    yield Slot.of(path, "lora_B", "lora_B.weight", (shape.out_features, rank), why, scaling=scaling)
    if spec.lora_bias:
        yield Slot.of(path, "lora_bias", "lora_B.bias", (shape.out_features,), scaling=scaling)
    if spec.use_dora:
        yield Slot.of(path, "magnitude", "lora_magnitude_vector", (shape.out_features,))


def pooled(spec: AdapterSpec, slot: Slot, shape: tuple[int, ...]) -> Slot:
    """The slot of a QALoRA factor that is in the file with this shape.

    PEFT makes QALoRA's of GPTQ bases alone (`peft.tuners.lora.variants.QALoraLinearVariant.forward`): A sees the mean
    of each group of inputs, times the number of groups. On any other base it makes plain LoRA of the same config.
    """
    rank, in_features = slot.shape
    size = spec.qalora_group_size
    if slot.part != "lora_A" or in_features % size or shape != (rank, in_features // size):
        return slot
    return slot._replace(shape=shape, num_repeats=size, scaling=in_features / size**2)


def _embedding(spec: AdapterSpec, path: str, shape: EmbeddingShape, matcher: Matcher) -> Iterator[Slot]:
    rank, scaling = spec.rank_of(path, matcher), spec.scaling_of(path, matcher)
    why = f"rank {rank} and the base"
    yield Slot.of(path, "lora_A", "lora_embedding_A", (rank, shape.num_embeddings), why, is_transposed=True)
    yield Slot.of(path, "lora_B", "lora_embedding_B", (shape.embedding_dim, rank), why, scaling=scaling)
    if spec.use_dora:
        yield Slot.of(path, "magnitude", "lora_magnitude_vector", (shape.embedding_dim,))


def _saved(spec: AdapterSpec, layers: BaseLayers, path: str, whole: str) -> Iterator[Slot]:
    """With `bias: all` PEFT stores a bias three times: as it is, with its wrapper's name, and as the base has it."""
    is_transposed = path in layers.transposed
    for name, shape in parameter_shapes(layers, path).items():
        is_required = name != "bias" or path in layers.others
        flipped = is_transposed and name == "weight" and path in layers.linears
        stored = shape[::-1] if flipped else shape
        yield Slot.of(path, f"parameter.{name}", name, stored, is_required=is_required, is_transposed=flipped)
    if spec.bias == "all" and "bias" in parameter_shapes(layers, path):
        shape = parameter_shapes(layers, path)["bias"]
        inside = path.removeprefix(whole).lstrip(".") + "." if path != whole else ""
        for wrapper, part in (("modules_to_save", "twin"), ("original_module", "copy.bias")):
            yield Slot(path, part, f"{PREFIX}{whole}.{wrapper}.{inside}bias", shape, is_required=False)


def _tokens(layers: BaseLayers, targets: Targets) -> Iterator[Slot]:
    """An output head that follows an embedding is built of the embedding's own tensor."""
    followed = {path: (path, ids) for path, ids in targets.tokens.items()}
    followed |= {head: (path, targets.tokens[path]) for head, path in targets.tied_tokens.items()}
    for path, (source, ids) in followed.items():
        shape = len(ids), parameter_shapes(layers, path)["weight"][1]
        why = f"{len(ids)} trainable_token_indices and the base"
        name = f"{PREFIX}{source}.token_adapter.trainable_tokens"
        yield Slot(path, "tokens", f"{name}_delta", shape, why)
        yield Slot(path, "copy.tokens", f"{name}_original", shape, why, is_required=False)


def _target_parameters(spec: AdapterSpec, layers: BaseLayers, targets: Targets, matcher: Matcher) -> Iterator[Slot]:
    """The wrappers of one module's parameters lie around one another, the last parameter's outermost."""
    for position, target in enumerate(targets.parameters):
        around = sum(other.path == target.path for other in targets.parameters[position + 1 :])
        yield from _factors(spec, layers, target, "base_layer." * around, matcher)


def _factors(
    spec: AdapterSpec, layers: BaseLayers, target: TargetParameter, wrappers: str, matcher: Matcher
) -> Iterator[Slot]:
    path, name = target
    rank, scaling = spec.rank_of(target.full_name, matcher), spec.scaling_of(target.full_name, matcher)
    num_experts, in_features, out_features = expert_sizes(layers, target)
    sizes = (rank * num_experts, in_features), (out_features, rank * num_experts)
    is_swapped = path in layers.embeddings or (path in layers.linears and path in layers.transposed)
    parts = ("lora_B", "lora_A") if is_swapped else ("lora_A", "lora_B")
    if path in layers.others:
        parts = f"lora_A.{name}", f"lora_B.{name}"
    why = f"rank {rank} and the base"
    scalings = (scaling, 1.0) if is_swapped else (1.0, scaling)
    for letter, part, size, factor in zip("AB", parts, sizes, scalings, strict=True):
        is_transposed = is_swapped and not (path in layers.embeddings and letter == "B")
        full = f"{wrappers}lora_{letter}.weight"
        yield Slot.of(path, part, full, size, why, is_transposed=is_transposed, scaling=factor)


def expert_sizes(layers: BaseLayers, target: TargetParameter) -> tuple[int, int, int]:
    """Experts, inputs and outputs that PEFT sees in a parameter (`peft.tuners.lora.layer.ParamWrapper`)."""
    shape = parameter_shapes(layers, target.path)[target.name]
    is_transposed = target.path in layers.transposed
    if len(shape) == 3:
        return (shape[0], shape[1], shape[2]) if is_transposed else (shape[0], shape[2], shape[1])
    flipped = is_transposed and target.path in layers.linears
    return (1, shape[0], shape[1]) if flipped else (1, shape[1], shape[0])


def pieces_of(slot: Slot, layers: BaseLayers) -> Sequence[Slot]:
    """The slots of the same tensor in files of transformers 4, where experts had linears with factors of their own.

    PEFT puts them together where it wraps first what it then finds there: the down projection's lie outermost.
    """
    letter, _, parameter = slot.part.partition(".")
    linears = layers.legacy_names.linears_in(parameter) if layers.legacy_names else ()
    wrapper = "base_layer." if len(linears) > 1 else ""
    if slot.path in layers.transposed or not linears or slot.label != f"{wrapper}{letter}.weight":
        return []
    num_experts = parameter_shapes(layers, slot.path)[parameter][0]
    rows, columns = slot.shape
    shape = (rows // num_experts // len(linears), columns)
    if letter == "lora_B":
        shape = (rows // len(linears), columns // num_experts // len(linears))
    return [
        Slot.of(slot.path, slot.part, f"{e}.{linear}.{letter}.weight", shape, slot.needed_by, whole=slot, piece=(e, i))
        for e in range(num_experts)
        for i, linear in enumerate(linears)
    ]


def _biases(spec: AdapterSpec, layers: BaseLayers, targets: Targets) -> Iterator[Slot]:
    """PEFT looks for a bias under every layer of its own, and with `all` in every other module too."""
    wrapped = dict.fromkeys(targets.linears, 1)
    for target in targets.parameters:
        wrapped[target.path] = wrapped.get(target.path, 0) + 1
    for path in (*layers.linears, *layers.others):
        shapes = parameter_shapes(layers, path)
        is_asked_for = spec.bias == "all" or path in wrapped
        if is_asked_for and "bias" in shapes and path not in targets.saved:
            part = "bias" if path in layers.linears else "parameter.bias"
            name = "base_layer." * wrapped.get(path, 0) + "bias"
            yield Slot.of(path, part, name, shapes["bias"], is_required=False)


def _copies(layers: BaseLayers, targets: Targets) -> Iterator[Slot]:
    """PEFT stores the embeddings themselves beside what it trains on them (`save_embedding_layers`)."""
    heads = [path for path in layers.linears if path in layers.tied or path.rpartition(".")[2] in OUTPUT_HEADS]
    for path in (*layers.embeddings, *(heads if layers.embeddings else ())):  # without them only shapes are known
        shape = parameter_shapes(layers, path)["weight"]
        wrappers = ("", "base_layer.", "token_adapter.base_layer.")
        for wrapper in wrappers[path in targets.saved :]:
            yield Slot.of(path, "copy.weight", f"{wrapper}weight", shape, is_required=False)


def parameter_shapes(layers: BaseLayers, path: str) -> dict[str, tuple[int, ...]]:
    """Of the module at `path`; a linear may have no bias."""
    if path in layers.linears:
        linear = layers.linears[path]
        return {"weight": (linear.out_features, linear.in_features), "bias": (linear.out_features,)}
    if path in layers.embeddings:
        return {"weight": tuple(layers.embeddings[path])}
    return dict(layers.others[path])
