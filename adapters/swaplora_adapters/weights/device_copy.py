"""An adapter that was built on the host, copied to a device: one span of its memory each.

One that lies in pinned memory as it will on the device goes there in one copy, any other through pinned pieces.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
        layout = Layout(tensor for tensor in weights.all_tensors if tensor.device != self._device)
        with told_when_full(weights):
            memory = torch.empty(layout.num_bytes, dtype=torch.uint8, device=self._device)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
        whole = layout.found()
        if whole is not None and whole.is_pinned():
            self._pieces[0].send_pinned(whole, memory)
        else:
            for start, chunks in layout.pieces(self._pieces[0].size):
                self._pieces.reverse()
                self._pieces[0].send(chunks, memory[start:])
        for piece in self._pieces:
            piece.wait()
        return moved(weights, layout.cut(memory))


def moved(weights: AdapterWeights, made: Callable[[Tensor], Tensor]) -> AdapterWeights:
    """The same adapter with what `made` makes of each of its tensors."""
    return replace(
        weights,
        modules=_moved(weights.modules, made),
        embeddings=_moved(weights.embeddings, made),
        replaced=MappingProxyType({path: with_tensors(own, made) for path, own in weights.replaced.items()}),
        head=None if weights.head is None else with_tensors(weights.head, made),
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
        self.send_pinned(self._memory[:num_bytes], to[:num_bytes])

    def send_pinned(self, pinned: Tensor, to: Tensor) -> None:
        """Start copying bytes that are pinned already."""
        with self._on_stream():
            to.copy_(pinned, non_blocking=True)
            self._sent = None if self._stream is None else self._stream.record_event()

    def wait(self) -> None:
        """Until what was sent has arrived."""
        if self._sent is not None:
            self._sent.synchronize()
            self._sent = None

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class Layout:
    """Where tensors lie in one piece of memory, each as its elements lie on the host."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = {id(tensor): tensor for tensor in tensors}
        sizes = [aligned(tensor.nbytes) for tensor in self._tensors.values()]
        self._starts = dict(zip(self._tensors, _running_sums(sizes), strict=True))
        self.num_bytes = sum(sizes)

    def found(self) -> Tensor | None:
        """The memory in which they lie like this already, [num_bytes], if they do."""
        held = [(tensor, self._starts[key]) for key, tensor in self._tensors.items() if tensor.nbytes]
        firsts = {(tensor.untyped_storage().data_ptr(), tensor.data_ptr() - start) for tensor, start in held}
        if len(firsts) != 1 or not all(_is_whole(tensor) for tensor, _ in held):
            return None
        storage = held[0][0].untyped_storage()
        first = firsts.pop()[1] - storage.data_ptr()
        if first < 0 or first + self.num_bytes > storage.nbytes():
            return None
        return torch.empty(0, dtype=torch.uint8).set_(storage, first, (self.num_bytes,), (1,))

    def fill(self, memory: Tensor) -> None:
        """Copy them into `memory` [num_bytes] on the host."""
        for key, tensor in self._tensors.items():
            memory[self._starts[key] :][: tensor.nbytes].copy_(_flat(tensor).view(torch.uint8))

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

    def cut(self, memory: Tensor) -> Callable[[Tensor], Tensor]:
        """Of memory into which they were copied: what makes of each its copy there, and of any other tensor itself."""

        def made(tensor: Tensor) -> Tensor:
            start = self._starts.get(id(tensor))
            if start is None:
                return tensor
            flat = memory[start : start + tensor.nbytes].view(tensor.dtype)
            return flat.view(tensor.t().shape).t() if _is_transposed(tensor) else flat.view(tensor.shape)

        return made


def _running_sums(sizes: list[int]) -> Iterator[int]:
    total = 0
    for size in sizes:
        yield total
        total += size


def _is_transposed(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and not tensor.is_contiguous()


def _is_whole(tensor: Tensor) -> bool:
    """Whether its elements lie side by side, in the order of `_flat`."""
    return (tensor.t() if _is_transposed(tensor) else tensor).is_contiguous()


def _flat(tensor: Tensor) -> Tensor:
    return (tensor.t() if _is_transposed(tensor) else tensor).contiguous().view(-1)


def _moved(parts: Mapping[str, _Part], made: Callable[[Tensor], Tensor]) -> Mapping[str, _Part]:
    return MappingProxyType({path: _part_moved(part, made) for path, part in parts.items()})


def _part_moved(part: _Part, made: Callable[[Tensor], Tensor]) -> _Part:
    own: Any = part
    tensors = {each.name: getattr(own, each.name) for each in fields(own)}
    changed: _Part = replace(own, **{name: made(value) for name, value in tensors.items() if isinstance(value, Tensor)})
    return changed
