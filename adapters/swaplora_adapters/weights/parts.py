"""The tensors of one module, gathered out of a file until all of them are there."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from swaplora_adapters.files.complaints import quoted
from swaplora_adapters.fit.fit import Layout
from swaplora_adapters.fit.slots import Slot
from swaplora_adapters.weights.values import converted, is_copy, is_finite, scaled


class Part(NamedTuple):
    """A tensor in its slot, the right way round."""

    slot: Slot
    tensor: Tensor


@dataclass(slots=True)
class Parts:
    """What a file has for the module at `path`; whoever builds it notes what is wrong with the values."""

    layout: Layout
    path: str
    dtype: torch.dtype  # to serve in
    tensors: dict[str, Part] = field(default_factory=dict)  # by `Slot.part`
    complaints: list[str] = field(default_factory=list)
    zeros: set[str] = field(default_factory=set)  # which parts hold nothing else
    has_effect: bool = False
    pieces: dict[Slot, dict[tuple[int, int], Tensor]] = field(default_factory=dict)  # by what they are pieces of

    def add(self, slot: Slot, tensor: Tensor) -> None:
        """Keep a tensor, or compare it with the base's if it is but a copy of that."""
        kind, _, what = slot.part.partition(".")
        if kind == "copy":
            self._compare(slot, tensor, what)
        elif slot.whole is not None:
            self.pieces.setdefault(slot.whole, {})[slot.piece] = tensor
        else:
            self.tensors[slot.part] = Part(slot, tensor.t() if slot.is_transposed else tensor)

    def join(self) -> None:
        """Put pieces together, once all of them are there."""
        for slot, pieces in self.pieces.items():
            self.tensors[slot.part] = Part(slot, _joined(slot, pieces))

    def base(self, name: str) -> Tensor | None:
        """A parameter of the base's module in float32, None where it has none."""
        try:
            return self.layout.layers.read(f"{self.path}.{name}")
        except KeyError:
            return None

    def weight(self) -> Tensor:
        """The base's own, in float32."""
        return self.layout.layers.read(f"{self.path}.weight")

    def scaled(self, part: str, scaling: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """A part as it is served, times `scaling`."""
        slot, tensor = self.tensors[part]
        return self.checked(slot, tensor, scaling, dtype)

    def checked(self, slot: Slot, tensor: Tensor, scaling: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """`values.scaled`, with a complaint if the result is not finite."""
        served = scaled(tensor, scaling, dtype or self.dtype)
        self.note(slot, tensor, served.is_finite, served.is_zero)
        return served.tensor

    def note(self, slot: Slot, tensor: Tensor, is_finite: bool, is_zero: bool) -> None:
        """What was seen of a tensor once it was scaled."""
        if not is_finite:
            self.complaints.append(self._complaint(slot, tensor))
        if is_zero:
            self.zeros.add(slot.part)

    def exact(self, part: str, dtype: torch.dtype) -> Tensor:
        """A part in exactly this dtype, not scaled."""
        slot, tensor = self.tensors[part]
        result = converted(tensor, dtype)
        if not is_finite(result):
            self.complaints.append(self._complaint(slot, tensor))
        return result

    @property
    def has_delta(self) -> bool:
        """Whether neither of the factors that were built is zero."""
        return self.tensors.keys() >= {"lora_A", "lora_B"} and not self.zeros & {"lora_A", "lora_B"}

    def vector(self, part: str) -> Tensor | None:
        """A part in float32, times its scaling, if the file has it."""
        if part not in self.tensors:
            return None
        return self.exact(part, torch.float32) * self.tensors[part].slot.scaling

    def _compare(self, slot: Slot, tensor: Tensor, what: str) -> None:
        base = self.base("weight" if what == "tokens" else what)
        if base is not None and what == "tokens":
            base = base[list(self.layout.tokens_of(self.path))]
        if base is None or not is_copy(tensor, base, self.dtype):
            self.complaints.append(
                f"{quoted(slot.name)} is not the base's own: the adapter was trained on a base that was changed"
            )

    def _complaint(self, slot: Slot, tensor: Tensor) -> str:
        if torch.isfinite(tensor).all():
            kind = str(self.dtype).removeprefix("torch.")
            return f"{quoted(slot.name)} overflows {kind} once it is scaled"
        return f"{quoted(slot.name)} holds NaN or infinity"


def gather(layout: Layout, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[Parts]:
    """Each module's parts as soon as the last of them has come; no longer held here then."""
    missing = Counter(slot.path for uses in layout.slots.values() for slot in uses)
    gathered: dict[str, Parts] = {}
    for name, tensor in tensors:
        for slot in layout.slots[name]:
            parts = gathered.get(slot.path) or gathered.setdefault(slot.path, Parts(layout, slot.path, dtype))
            parts.add(slot, tensor)
            missing[slot.path] -= 1
            if not missing[slot.path]:
                parts.join()
                yield gathered.pop(slot.path)


def _joined(slot: Slot, pieces: Mapping[tuple[int, int], Tensor]) -> Tensor:
    """An expert's factors of several linears beside one another: A's rows, and B's blocks, in which a rank is a column.

    lora_A is [num_experts * rank, in_features], lora_B [out_features, rank * num_experts].
    """
    num_experts, num_linears = (1 + max(numbers) for numbers in zip(*pieces, strict=True))
    experts = [[pieces[expert, linear] for linear in range(num_linears)] for expert in range(num_experts)]
    if slot.part.startswith("lora_A"):
        return torch.cat([tensor for expert in experts for tensor in expert])
    return torch.stack([_block_diagonal(expert) for expert in experts], dim=2).flatten(1)


def _block_diagonal(blocks: list[Tensor]) -> Tensor:
    diagonal: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return diagonal
