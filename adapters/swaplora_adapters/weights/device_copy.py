"""An adapter that was built on the host, copied to a device: one span of its memory each, through pinned pieces."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from swaplora_adapters.errors import MemoryFullError
from swaplora_adapters.weights.memory import aligned
from swaplora_adapters.weights.module_copy import with_tensors
from swaplora_adapters.weights.served import AdapterWeights, EmbeddingWeights, LinearWeights

PIECE_BYTES = 64 << 20  # of pinned memory, of which there are two: one is filled while the other is copied

_Part = TypeVar("_Part", LinearWeights, EmbeddingWeights)


class DeviceCopier:
    """Copies adapters to `device` beside the steps that run there. Only the thread that loads adapters calls it.

    The span of an adapter comes from torch's allocator in the order of the steps' stream, and the copy waits for what
    that stream had been given before: a span that was freed while a step was still to read it is written after it.
    """

    def __init__(self, device: torch.device, piece_bytes: int = PIECE_BYTES) -> None:
        self._device = device if device.type != "cuda" else torch.device("cuda", device.index or 0)  # as tensors say it
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pieces = [_Piece(piece_bytes, self._stream) for _ in range(2)]

    def copy(self, weights: AdapterWeights) -> AdapterWeights:
        """The same adapter on the device, complete when this returns; what lies there already is left where it is.

        The one that is given stays as it is, for the host's tier. Raises MemoryFullError where the device has no room.
        """
        with told_when_full(weights):
            span = _Span([tensor for tensor in weights.all_tensors if tensor.device != self._device], self._device)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
        for start, chunks in span.pieces(self._pieces[0].size):
            self._pieces.reverse()
            self._pieces[0].send(chunks, span.memory[start:])
        for piece in self._pieces:
            piece.wait()
        return replace(
            weights,
            modules=_moved(weights.modules, span),
            embeddings=_moved(weights.embeddings, span),
            replaced=MappingProxyType(
                {path: with_tensors(own, span.on_device) for path, own in weights.replaced.items()}
            ),
            head=None if weights.head is None else with_tensors(weights.head, span.on_device),
        )


@contextmanager
def told_when_full(weights: AdapterWeights) -> Iterator[None]:
    """Raise MemoryFullError for `weights` where a device has no room for what is made in the block."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryFullError(
            f"the GPU has no room for an adapter of {weights.nbytes} bytes: lower --kv-cache-bytes, or "
            "--adapter-memory-bytes to what it can hold"
        ) from error


class _Piece:
    """Pinned memory through which bytes go to the device."""

    def __init__(self, size: int, stream: "torch.cuda.Stream | None") -> None:
        self.size = size
        self._stream = stream
        self._memory: Tensor | None = None
        self._sent: torch.cuda.Event | None = None

    def send(self, chunks: Sequence[tuple[int, Tensor]], to: Tensor) -> None:
        """Start copying bytes, each chunk to its place in `to`, in one go. What is between them may be of any value."""
        self.wait()
        if self._memory is None:
            self._memory = torch.empty(self.size, dtype=torch.uint8, pin_memory=self._stream is not None)
        for start, chunk in chunks:
            self._memory[start : start + len(chunk)].copy_(chunk)
        last_start, last = chunks[-1]
        num_bytes = last_start + len(last)
        with self._on_stream():
            to[:num_bytes].copy_(self._memory[:num_bytes], non_blocking=True)
            self._sent = None if self._stream is None else self._stream.record_event()

    def wait(self) -> None:
        """Until what was sent has arrived."""
        if self._sent is not None:
            self._sent.synchronize()
            self._sent = None

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class _Span:
    """Where the tensors of one adapter lie in one allocation, each as its elements lie on the host."""

    def __init__(self, tensors: list[Tensor], device: torch.device) -> None:
        self._tensors = {id(tensor): tensor for tensor in tensors}
        sizes = [aligned(tensor.nbytes) for tensor in self._tensors.values()]
        self._starts = dict(zip(self._tensors, _running_sums(sizes), strict=True))
        self.memory = torch.empty(sum(sizes), dtype=torch.uint8, device=device)

    def pieces(self, size: int) -> Iterator[tuple[int, list[tuple[int, Tensor]]]]:
        """The span in pieces of at most `size` bytes: where each starts, and the bytes of tensors at places in it."""
        start, chunks = 0, list[tuple[int, Tensor]]()
        for key, tensor in self._tensors.items():
            at, rest = self._starts[key], _flat(tensor).view(torch.uint8)
            while len(rest):
                if at >= start + size:
                    yield start, chunks
                    start, chunks = at, []
                chunk = rest[: start + size - at]
                chunks.append((at - start, chunk))
                at, rest = at + len(chunk), rest[len(chunk) :]
        if chunks:
            yield start, chunks

    def on_device(self, tensor: Tensor) -> Tensor:
        """The copy of one of the tensors; any other tensor itself."""
        start = self._starts.get(id(tensor))
        if start is None:
            return tensor
        flat = self.memory[start : start + tensor.nbytes].view(tensor.dtype)
        return flat.view(tensor.t().shape).t() if _is_transposed(tensor) else flat.view(tensor.shape)


def _running_sums(sizes: list[int]) -> Iterator[int]:
    total = 0
    for size in sizes:
        yield total
        total += size


def _is_transposed(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and not tensor.is_contiguous()


def _flat(tensor: Tensor) -> Tensor:
    return (tensor.t() if _is_transposed(tensor) else tensor).contiguous().view(-1)


def _moved(parts: Mapping[str, _Part], span: _Span) -> Mapping[str, _Part]:
    return MappingProxyType({path: _part_moved(part, span) for path, part in parts.items()})


def _part_moved(part: _Part, span: _Span) -> _Part:
    own: Any = part
    tensors = {each.name: getattr(own, each.name) for each in fields(own)}
    moved: _Part = replace(
        own, **{name: span.on_device(value) for name, value in tensors.items() if isinstance(value, Tensor)}
    )
    return moved
