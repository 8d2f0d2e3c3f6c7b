"""The kinds of adapters other than LoRA whose delta is known from their tensors alone, each as PEFT computes it.

Every kind says which tensors a module has, checks their shapes, and cuts the delta in its cheapest form.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from swaplora_adapters.derive.lowrank import Limit, LowRank, cut_factors, cut_kronecker, cut_matrix
from swaplora_adapters.fit.base import LinearShape

Shapes = Mapping[str, tuple[int, ...]]  # of a module's tensors, by part
Tensors = Mapping[str, Tensor]


class Module(NamedTuple):
    """What the config and the base say of one module."""

    shape: LinearShape
    rank: int
    scaling: float
    seed: int  # FourierFT draws its frequencies from it


@dataclass(frozen=True, slots=True)
class Kind:
    """One peft_type. `shared` are tensors of the whole adapter, which `cut` finds among a module's own."""

    parts: frozenset[str]
    shared: frozenset[str]
    ignored: frozenset[str]  # config fields that say how it was trained, or what the shapes say already
    defaults: Mapping[str, object]  # of config fields that PEFT reads differently from LoRA's, or LoRA does not have
    has_patterns: bool  # rank_pattern and alpha_pattern
    complaints: Callable[[Shapes, Module], Iterator[str]]
    cut: Callable[[Tensors, Module, Limit], LowRank]


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


def _cut_loha(tensors: Tensors, module: Module, limit: Limit) -> LowRank:
    """(w1_a w1_b) ⊙ (w2_a w2_b): its factors are all products of a row of the one with the same row of the other."""
    w1_a, w1_b, w2_a, w2_b = (tensors[f"hada_{x}"].double() for x in ("w1_a", "w1_b", "w2_a", "w2_b"))
    if module.rank**2 >= min(module.shape):
        return cut_matrix((w1_a @ w1_b) * (w2_a @ w2_b) * module.scaling, limit)
    lora_A = torch.einsum("rn,sn->rsn", w1_b, w2_b).flatten(0, 1)
    lora_B = torch.einsum("mr,ms->mrs", w1_a, w2_a).flatten(1, 2)
    return cut_factors(lora_A, lora_B * module.scaling, limit)


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


def _cut_lokr(tensors: Tensors, module: Module, limit: Limit) -> LowRank:
    """w1 ⊗ w2, where either may be a product of two factors itself."""
    first, second = (
        tensors[name].double() if name in tensors else tensors[f"{name}_a"].double() @ tensors[f"{name}_b"].double()
        for name in ("lokr_w1", "lokr_w2")
    )
    return cut_kronecker(first * module.scaling, second, limit)


def _vera_complaints(found: Shapes, module: Module) -> Iterator[str]:
    return _expect(found, {"vera_lambda_b": (module.shape.out_features,), "vera_lambda_d": (module.rank,)})


def _cut_vera(tensors: Tensors, module: Module, limit: Limit) -> LowRank:
    """diag(b) B diag(d) A, with the corner of the shared B and A that the module is large (arXiv:2310.11454)."""
    shape = module.shape
    lora_A = tensors["vera_lambda_d"].double()[:, None] * tensors["vera_A"][:, : shape.in_features]
    lora_B = tensors["vera_lambda_b"].double()[:, None] * tensors["vera_B"][: shape.out_features]
    return cut_factors(lora_A, lora_B, limit)


def _fourier_complaints(found: Shapes, module: Module) -> Iterator[str]:
    spectrum, num_entries = found.get("fourierft_spectrum", ()), module.shape.in_features * module.shape.out_features
    if len(spectrum) != 1 or spectrum[0] > num_entries:
        yield f"needs fourierft_spectrum of one dimension and at most {num_entries} frequencies"


def _cut_fourier(tensors: Tensors, module: Module, limit: Limit) -> LowRank:
    """The real part of the inverse 2D transform of a few coefficients, at places drawn by seed (arXiv:2405.03003)."""
    values, shape = tensors["fourierft_spectrum"].float(), module.shape
    num_entries = shape.out_features * shape.in_features
    places = torch.randperm(num_entries, generator=torch.Generator().manual_seed(module.seed))[: len(values)]
    spectrum = torch.zeros(num_entries).scatter(0, places, values).view(shape.out_features, shape.in_features)
    return cut_matrix(torch.fft.ifft2(spectrum).real * module.scaling, limit)


_LYCORIS_TRAINING = frozenset({"rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"})
KINDS: Mapping[str, Kind] = {
    "LOHA": Kind(
        parts=frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
        shared=frozenset(),
        ignored=_LYCORIS_TRAINING,
        defaults={"r": 8, "alpha": 8},
        has_patterns=True,
        complaints=_loha_complaints,
        cut=_cut_loha,
    ),
    "LOKR": Kind(
        parts=frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}),
        shared=frozenset(),
        ignored=_LYCORIS_TRAINING | {"rank_dropout_scale", "decompose_both", "decompose_factor"},
        defaults={"r": 8, "alpha": 8},
        has_patterns=True,
        complaints=_lokr_complaints,
        cut=_cut_lokr,
    ),
    "VERA": Kind(
        parts=frozenset({"vera_lambda_b", "vera_lambda_d"}),
        shared=frozenset({"vera_A", "vera_B"}),
        ignored=frozenset({"vera_dropout", "d_initial", "init_weights"}),
        defaults={"r": 256, "projection_prng_key": 0, "save_projection": True},
        has_patterns=False,
        complaints=_vera_complaints,
        cut=_cut_vera,
    ),
    "FOURIERFT": Kind(
        parts=frozenset({"fourierft_spectrum"}),
        shared=frozenset(),
        ignored=frozenset({"n_frequency", "n_frequency_pattern", "init_weights"}),
        defaults={"scaling": 150.0, "random_loc_seed": 777},
        has_patterns=False,
        complaints=_fourier_complaints,
        cut=_cut_fourier,
    ),
}
