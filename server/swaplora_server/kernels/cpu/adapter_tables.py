"""What native kernels read of one adapter, by the number of each module: made when it is loaded, and freed with it."""

import ctypes
from collections.abc import Sequence

import torch
from torch import nn

from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.kernels.cpu.abi import Factors, NormWeight
from swaplora_server.kernels.cpu.linear import CpuLinear
from swaplora_server.kernels.cpu.panels import PanelWeights, in_panels


class AdapterTables:
    """Where an adapter has its factors, and its modules in place of the base's. Points into its own tensors.

    Factors that were not placed in panels are copied into some.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype, weights: AdapterWeights, paths: Sequence[str]) -> None:
        """`dtype` is the number format of products; `paths` are those of all modules by number."""
        self._panels = {path: in_panels(library, dtype, module) for path, module in weights.modules.items()}
        self.factors = (Factors * len(paths))()
        self.modules = (ctypes.c_void_p * len(paths))()
        self._norms: list[NormWeight] = []
        numbers = {path: number for number, path in enumerate(paths)}
        for path, module in self._panels.items():
            self.factors[numbers[path]] = _factors_of(module, dtype)
        for path, own in weights.replaced.items():
            self.modules[numbers[path]] = _address(own, self._norms)


def tables_of(weights: AdapterWeights) -> AdapterTables:
    """Those of a prepared adapter. Raises RuntimeError for one that is not: steps make none."""
    tables = weights.tables
    if not isinstance(tables, AdapterTables):
        raise RuntimeError(f"adapter {weights.digest} was not prepared for native kernels")
    return tables


def _factors_of(module: PanelWeights, dtype: torch.dtype) -> Factors:
    """Raises RuntimeError for factors in more than the number format of products: their kernel would misread them."""
    vectors = [None if vector is None else vector.data_ptr() for vector in (module.column_scale, module.shift)]
    factors = module.panels_A, module.panels_B
    is_bf16 = [panels.dtype == torch.bfloat16 for panels in factors]
    if dtype == torch.bfloat16 and not all(is_bf16):
        raise RuntimeError("an adapter's factors were placed for another number format than this backend's products")
    return Factors(*(panels.data_ptr() for panels in factors), *vectors, module.rank, *is_bf16, True)


def _address(module: nn.Module, norms: list[NormWeight]) -> int | None:
    """Of what fused layers read of an adapter's own module: a packed linear, a LayerNorm, the weight of another norm.

    What is made for it is added to `norms`.
    """
    if isinstance(module, CpuLinear):
        return ctypes.addressof(module.packed)
    own = dict(module.named_parameters(recurse=False))
    if isinstance(module, nn.LayerNorm) and len(own) > 1:
        norms.append(NormWeight(own["weight"].data_ptr(), own["bias"].data_ptr()))
        return ctypes.addressof(norms[-1])
    return own["weight"].data_ptr() if "weight" in own else None
