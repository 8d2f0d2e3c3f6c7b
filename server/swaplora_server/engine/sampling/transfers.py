"""Numbers to the device of the logits in one copy a step, and back, for which a step waits once."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_WORD = 8  # bytes: what is joined begins at multiples of so many


class Sent:
    """Numbers on the host, and once they were sent on the device."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.tensor = torch.from_numpy(np.ascontiguousarray(values))


class Outgoing:
    """All numbers of a step that go to a device. From memory that is not pinned a copy may wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sent: list[Sent] = []

    def put(self, values: NDArray[Any]) -> Sent:
        """Have these go as well, in their own number format."""
        self._sent.append(Sent(values))
        return self._sent[-1]

    def send(self) -> None:
        """Send what was put, once."""
        if self._sent and self._device.type != "cpu":
            on_host = [sent.tensor for sent in self._sent]
            on_device = part(stage(on_host, pinned=True).to(self._device, non_blocking=True), on_host)
            for sent, tensor in zip(self._sent, on_device, strict=True):
                sent.tensor = tensor


def send(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[len(values)], by themselves: for prompts that are scored, after their forward."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def bring(*tensors: Tensor) -> list[Any]:
    """Nested lists of numbers of 8 bytes: in one copy and one wait, for all that was launched before."""
    if tensors[0].device.type == "cpu":
        return [tensor.tolist() for tensor in tensors]
    joined = join(tensors)
    host = torch.empty_like(joined, device="cpu", pin_memory=True).copy_(joined, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()
    copied.synchronize()
    return [tensor.tolist() for tensor in part(host, tensors)]


def join(tensors: Sequence[Tensor]) -> Tensor:
    """The bits of numbers of 8 bytes, one after the other, as int64."""
    return torch.cat([tensor.reshape(-1).view(torch.int64) for tensor in tensors])


def stage(tensors: Sequence[Tensor], *, pinned: bool) -> Tensor:
    """The same of numbers of any size that lie on the host, each tensor from a whole word on."""
    joined = torch.empty(sum(map(_num_words, tensors)), dtype=torch.int64, pin_memory=pinned)
    for room, tensor in zip(part(joined, tensors), tensors, strict=True):
        room.copy_(tensor)
    return joined


def part(joined: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What `join` or `stage` has joined, in the shapes and number formats of `like`."""
    stops = accumulate(map(_num_words, like))
    return [
        joined[stop - _num_words(tensor) : stop]
        .view(torch.uint8)[: tensor.nbytes]
        .view(tensor.dtype)
        .view(tensor.shape)
        for tensor, stop in zip(like, stops, strict=True)
    ]


def _num_words(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _WORD)
