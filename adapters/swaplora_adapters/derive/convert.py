"""An adapter of another kind made into LoRA: per module the smallest rank that keeps a share of the delta's energy.

Each kind's random places and projections, its delta where only the whole has it, and the rank are found by PEFT's own
functions. Its `convert_to_lora` makes and decomposes every delta whole: hours, where small factors are known.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import FourierFTConfig
from peft.tuners.fourierft.layer import FourierFTLinear
from peft.tuners.loha.layer import make_weight
from peft.tuners.lora.conversion import _find_cutoff_index
from peft.tuners.vera.model import _kaiming_init
from torch import Tensor, nn

from swaplora_adapters.derive.convertible import Convertible, projection_shapes, read_convertible
from swaplora_adapters.derive.kinds import Module
from swaplora_adapters.derive.lowrank import Limit, LowRank, cut_factors, cut_kronecker, cut_matrix
from swaplora_adapters.errors import InvalidAdapterError
from swaplora_adapters.files.complaints import capped, quoted
from swaplora_adapters.files.tensorfile import read_tensors
from swaplora_adapters.fit.base import LinearShape

Tensors = Mapping[str, Tensor]  # of a module, by part


@dataclass(frozen=True, slots=True)
class Converted:
    """What `convert` made, by module."""

    source: Convertible
    modules: Mapping[str, LowRank]


@torch.no_grad()
def convert(
    config_path: Path, weights_path: Path, shapes: Mapping[str, LinearShape], energy: float = 0.99
) -> Converted:
    """Read, check and convert the two files of an adapter.

    `energy` in (0, 1] is the share of the sum of squared singular values that each module keeps: what is lost is at
    most √(1 - energy) of its norm. Raises InvalidAdapterError and UnsupportedAdapterError like an upload.
    """
    source = read_convertible(config_path, weights_path, shapes)
    tensors = read_tensors(weights_path, source.header)
    _check_finite(tensors)
    projections, cut, limit = _projections(source), CUTS[source.kind_name], _with_energy(energy)
    modules = {}
    for path, module in source.modules.items():
        own = {part: tensors[name] for part, name in source.names[path].items()}
        modules[path] = cut({**own, **projections}, module, limit)
    return Converted(source, modules)


def _check_finite(tensors: Tensors) -> None:
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise InvalidAdapterError(capped([f"{quoted(name)} holds NaN or infinity" for name in broken]))


def _with_energy(share: float) -> Limit:
    """As few singular values as hold `share` of the sum of squares, added up in float64."""
    return lambda values: int(_find_cutoff_index(values.double(), share))


def _projections(source: Convertible) -> dict[str, Tensor]:
    """VeRA's A and B made again from their seed, where they are not in the file."""
    if source.projection_seed is None:
        return {}
    generator = torch.Generator().manual_seed(source.projection_seed)
    return {part: _kaiming_init(shape, generator) for part, shape in projection_shapes(source.modules).items()}


def _cut_loha(tensors: Tensors, module: Module, limit: Limit) -> LowRank:
    """(w1_a w1_b) ⊙ (w2_a w2_b): its factors are all products of a row of the one with the same row of the other."""
    w1_a, w1_b, w2_a, w2_b = (tensors[f"hada_{x}"].double() for x in ("w1_a", "w1_b", "w2_a", "w2_b"))
    if module.rank**2 >= min(module.shape):
        return cut_matrix(make_weight(w1_a, w1_b, w2_a, w2_b, w1_a.new_tensor(module.scaling)), limit)
    lora_A = torch.einsum("rn,sn->rsn", w1_b, w2_b).flatten(0, 1)
    lora_B = torch.einsum("mr,ms->mrs", w1_a, w2_a).flatten(1, 2)
    return cut_factors(lora_A, lora_B * module.scaling, limit)


def _cut_lokr(tensors: Tensors, module: Module, limit: Limit) -> LowRank:
    """w1 ⊗ w2, where either may be a product of two factors itself."""
    first, second = (
        tensors[name].double() if name in tensors else tensors[f"{name}_a"].double() @ tensors[f"{name}_b"].double()
        for name in ("lokr_w1", "lokr_w2")
    )
    return cut_kronecker(first * module.scaling, second, limit)


def _cut_vera(tensors: Tensors, module: Module, limit: Limit) -> LowRank:
    """diag(b) B diag(d) A, with the corner of the shared B and A that the module is large (arXiv:2310.11454)."""
    shape = module.shape
    lora_A = tensors["vera_lambda_d"].double()[:, None] * tensors["vera_A"][:, : shape.in_features]
    lora_B = tensors["vera_lambda_b"].double()[:, None] * tensors["vera_B"][: shape.out_features]
    return cut_factors(lora_A, lora_B, limit)


def _cut_fourier(tensors: Tensors, module: Module, limit: Limit) -> LowRank:
    """A few coefficients transformed back, at places drawn by seed (arXiv:2405.03003): it has no small factors."""
    spectrum = tensors["fourierft_spectrum"].float()
    linear = nn.Linear(*module.shape, bias=False, device="meta")
    config = FourierFTConfig(scaling=module.scaling, random_loc_seed=module.seed)
    layer = FourierFTLinear(linear, "default", config, n_frequency=len(spectrum))
    layer.fourierft_spectrum["default"] = nn.Parameter(spectrum)  # its own has no values, as the linear
    return cut_matrix(layer.get_delta_weight("default"), limit)


CUTS: Mapping[str, Callable[[Tensors, Module, Limit], LowRank]] = {
    "LOHA": _cut_loha,
    "LOKR": _cut_lokr,
    "VERA": _cut_vera,
    "FOURIERFT": _cut_fourier,
}
