"""Numbers to the device of the logits, for which nobody waits, and back from it, for which a step waits once."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


def send(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[len(values)]."""
    return send_tensor(torch.tensor(values, dtype=dtype), device)


def send_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on `device`. From memory that is not pinned a copy may wait for what the device is at."""
    pinned = tensor if device.type == "cpu" else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


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
    """Their bits, one after the other, as int64."""
    return torch.cat([tensor.reshape(-1).view(torch.int64) for tensor in tensors])


def part(joined: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What `join` has joined, in the shapes and number formats of `like`."""
    stops = accumulate(tensor.numel() for tensor in like)
    return [
        joined[stop - tensor.numel() : stop].view(tensor.dtype).view(tensor.shape)
        for tensor, stop in zip(like, stops, strict=True)
    ]
