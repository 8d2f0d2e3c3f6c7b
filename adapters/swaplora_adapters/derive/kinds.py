"""The kinds of adapters other than LoRA whose delta is known from their tensors alone, and which tensors those are."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from swaplora_adapters.fit.base import LinearShape

Shapes = Mapping[str, tuple[int, ...]]  # of a module's tensors, by part


class Module(NamedTuple):
    """What the config and the base say of one module."""

    shape: LinearShape
    rank: int
    scaling: float
    seed: int  # FourierFT draws its frequencies from it


@dataclass(frozen=True, slots=True)
class Kind:
    """One peft_type. `shared` are tensors of the whole adapter, which `convert` finds among a module's own."""

    parts: frozenset[str]
    shared: frozenset[str]
    ignored: frozenset[str]  # config fields that say how it was trained, or what the shapes say already
    defaults: Mapping[str, object]  # of config fields that PEFT reads differently from LoRA's, or LoRA does not have
    has_patterns: bool  # rank_pattern and alpha_pattern
    complaints: Callable[[Shapes, Module], Iterator[str]]


def _expect(found: Shapes, expected: Shapes) -> Iterator[str]:
    for part, shape in expected.items():
        if part not in found:
            yield f"has no {part}"
        elif found[part] != shape:
            yield f"has {part} of shape {list(found[part])}, its rank and the base need {list(shape)}"


def _loha_complaints(found: Shapes, module: Module) -> Iterator[str]:
    shape, rank = module.shape, module.rank
    a, b = (shape.out_features, rank), (rank, shape.in_features)
    return _expect(found, {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b})


def _lokr_complaints(found: Shapes, module: Module) -> Iterator[str]:
    sizes = []
    for name in ("lokr_w1", "lokr_w2"):
        a, b = found.get(f"{name}_a", ()), found.get(f"{name}_b", ())
        if name in found and not (a or b) and len(found[name]) == 2:
            sizes.append(found[name])
        elif name not in found and len(a) == len(b) == 2 and a[1] == b[0] == module.rank:
            sizes.append((a[0], b[1]))
        else:
            yield f"needs {name}, or {name}_a and {name}_b of rank {module.rank}, each of two dimensions"
    needed = (module.shape.out_features, module.shape.in_features)
    if len(sizes) == 2 and (sizes[0][0] * sizes[1][0], sizes[0][1] * sizes[1][1]) != needed:
        yield f"has Kronecker factors of shapes {list(sizes[0])} and {list(sizes[1])}, the base needs {list(needed)}"


def _vera_complaints(found: Shapes, module: Module) -> Iterator[str]:
    return _expect(found, {"vera_lambda_b": (module.shape.out_features,), "vera_lambda_d": (module.rank,)})


def _fourier_complaints(found: Shapes, module: Module) -> Iterator[str]:
    spectrum, num_entries = found.get("fourierft_spectrum", ()), module.shape.in_features * module.shape.out_features
    if len(spectrum) != 1 or spectrum[0] > num_entries:
        yield f"needs fourierft_spectrum of one dimension and at most {num_entries} frequencies"


_LYCORIS_TRAINING = frozenset({"rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"})
KINDS: Mapping[str, Kind] = {
    "LOHA": Kind(
        parts=frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
        shared=frozenset(),
        ignored=_LYCORIS_TRAINING,
        defaults={"r": 8, "alpha": 8},
        has_patterns=True,
        complaints=_loha_complaints,
    ),
    "LOKR": Kind(
        parts=frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}),
        shared=frozenset(),
        ignored=_LYCORIS_TRAINING | {"rank_dropout_scale", "decompose_both", "decompose_factor"},
        defaults={"r": 8, "alpha": 8},
        has_patterns=True,
        complaints=_lokr_complaints,
    ),
    "VERA": Kind(
        parts=frozenset({"vera_lambda_b", "vera_lambda_d"}),
        shared=frozenset({"vera_A", "vera_B"}),
        ignored=frozenset({"vera_dropout", "d_initial", "init_weights"}),
        defaults={"r": 256, "projection_prng_key": 0, "save_projection": True},
        has_patterns=False,
        complaints=_vera_complaints,
    ),
    "FOURIERFT": Kind(
        parts=frozenset({"fourierft_spectrum"}),
        shared=frozenset(),
        ignored=frozenset({"n_frequency", "n_frequency_pattern", "init_weights"}),
        defaults={"scaling": 150.0, "random_loc_seed": 777},
        has_patterns=False,
        complaints=_fourier_complaints,
    ),
}
