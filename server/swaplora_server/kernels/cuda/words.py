"""What steps tell a GPU in words of int64: written on the host, and brought to the device in one copy."""

from dataclasses import dataclass

import torch
from torch import Tensor

from swaplora_server.kernels.step import Ints


@dataclass(frozen=True, slots=True)
class Words:
    """An array on a device, which keeps its address, and its twin on the host, which is pinned beside a GPU."""

    on_device: Tensor  # int64
    _host: Tensor
    _copied: torch.cuda.Event | None  # the last copy, of this or of what it is a part of

    @classmethod
    def zeros(cls, num_words: int, device: torch.device) -> "Words":
        """So many."""
        is_cuda = device.type == "cuda"
        host = torch.zeros(num_words, dtype=torch.int64, pin_memory=is_cuda)
        event = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]
        return cls(torch.zeros(num_words, dtype=torch.int64, device=device), host, event)

    def part(self, start: int, length: int) -> "Words":
        """Some of them, which are written and sent as these are, or by themselves."""
        return Words(self.on_device[start : start + length], self._host[start : start + length], self._copied)

    def writable(self) -> Ints:
        """Those on the host, once no copy reads them any more."""
        if self._copied is not None:
            self._copied.synchronize()
        words: Ints = self._host.numpy()
        return words

    def send(self, count: int | None = None) -> None:
        """Have the device see what was written, or the first `count` of it, before what is launched from now on."""
        self.on_device[:count].copy_(self._host[:count], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
