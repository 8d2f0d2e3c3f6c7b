"""Mixtures per token: which of several adapters a row takes, module by module: PEFT's Arrow (arXiv:2405.11157).

An adapter's prototype at a module is the top right singular vector of its B A, the input that it changes most. A row x
takes the `top_k` of the members whose prototypes it is likest to, by |x · prototype|, in shares that are the softmax of
these over the temperature. So what a mixture adds to a module's output is Σ share · x Aᵀ Bᵀ over its members.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swaplora_adapters.priority import pause
from swaplora_adapters.weights.served import AdapterWeights, LinearWeights

Shares = NDArray[np.float32]  # [num_modules, num_rows, num_members], NaN for a module at which none were computed
# `ArrowLoraLinearLayer.top_right_singular_vec_from_BA`, with an `rng_seed` of 0
_ITERATIONS, _EPS, _SEED = 15, 1e-8, 0
PROTOTYPE_ITEM_BYTES = 4  # of each number, in float32


class Prototypes:
    """Those of one adapter, by the number of each module: [in_features], float32; None where it adds nothing."""

    def __init__(self, weights: AdapterWeights, paths: Sequence[str]) -> None:
        """`paths` are those of all modules by number. Takes some 0.1 ms a module: not for the engine's thread."""
        self.vectors = [_prototype(module) if (module := weights.modules.get(path)) else None for path in paths]
        addresses = [0 if vector is None else vector.data_ptr() for vector in self.vectors]
        self.addresses: NDArray[np.int64] = np.array(addresses, np.int64)


def _prototype(module: LinearWeights) -> Tensor:
    """By power iteration on (B A)ᵀ (B A), whose vectors are looked at as their images by A: [rank] in float64.

    As many steps as PEFT makes, from where it begins: where two singular values are close it has not converged.
    """
    pause()
    lora_A, lora_B = (factor.double().cpu() for factor in (module.lora_A, module.lora_B))
    start = torch.randn(lora_A.shape[1], generator=torch.Generator().manual_seed(_SEED)).double()
    A, image = lora_A.numpy(), (lora_A @ (start / (start.norm() + _EPS))).numpy()
    gram_A, gram_B = A @ A.T, (lora_B.t() @ lora_B).numpy()
    for _ in range(_ITERATIONS):
        w = gram_B @ image  # Aᵀ w is B A's own transpose, times B A, times the vector
        w /= np.sqrt(max(w @ gram_A @ w, 0.0)) + _EPS
        image = gram_A @ w
    return torch.from_numpy(A.T @ w).to(module.lora_A.device, torch.float32)


class Trace(Protocol):
    """Who is shown the shares of a request's rows."""

    @property
    def key(self) -> str:
        """No other's."""

    def begin(self, top_k: int) -> None:
        """The mixture that is traced takes so many members at once."""

    def note(self, start: int, shares: Shares) -> None:
        """Those of its tokens from `start` on, of all modules or of some; the rest may come in another call."""


@dataclass(frozen=True, slots=True, eq=False)
class Router:
    """How a mixture chooses among its members. All have prototypes at the same modules."""

    members: tuple[Prototypes, ...]
    top_k: int
    temperature: float
    trace: Trace | None = None

    @property
    def key(self) -> str:
        """What follows from it is the same for routers of equal keys and the same members."""
        traced = "" if self.trace is None else f", traced as {self.trace.key}"
        return f"arrow of {self.top_k} at {float(self.temperature).hex()}{traced}"


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """One member's place in a mixture."""

    router: Router
    member: int
