"""A safetensors reader that trusts nothing: the whole header is checked first, then tensors are read into owned memory.

The format: 8 bytes of header length (little-endian), a JSON header, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format). Nothing is mapped: truncating a mapped file kills the process.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from swaplora_adapters.errors import InvalidAdapterError
from swaplora_adapters.files.complaints import capped, quoted
from swaplora_adapters.files.disk import open_regular
from swaplora_adapters.files.naming import WEIGHTS_FILE
from swaplora_adapters.files.strict_json import loads
from swaplora_adapters.priority import pause

LENGTH_BYTES = 8
MAX_HEADER_DEPTH = 4
MAX_DIMENSIONS = 8
MAX_EMPTY_SIZE = 1 << 31
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a header may hold at most."""

    max_header_bytes: int = 8 << 20
    max_tensors: int = 32_768
    max_name_chars: int = 512


DEFAULT_LIMITS = Limits()


class TensorInfo(NamedTuple):
    """One tensor as the header describes it; `begin` and `end` count bytes from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: the tensors in the order of their bytes, which fill the rest of the file exactly."""

    tensors: Mapping[str, TensorInfo]
    data_offset: int
    file_bytes: int

    @property
    def num_parameters(self) -> int:
        """Elements in all tensors."""
        return sum(math.prod(info.shape) for info in self.tensors.values())


class RawHeader(NamedTuple):
    """A header as it is written, before it is looked at."""

    content: bytes
    file_bytes: int  # of the whole file


def read_header(path: Path, limits: Limits = DEFAULT_LIMITS) -> Header:
    """`read_raw_header`, then `parse_header`; raises what they do."""
    return parse_header(read_raw_header(path, limits), limits)


def read_raw_header(path: Path, limits: Limits = DEFAULT_LIMITS) -> RawHeader:
    """Read the header of a weights file, allocating no more than its bounded length.

    Raises InvalidAdapterError for a file that cannot have one.
    """
    pause()
    with open_regular(path) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        return RawHeader(_read_header_bytes(file, file_bytes, limits), file_bytes)


def parse_header(header: RawHeader, limits: Limits = DEFAULT_LIMITS) -> Header:
    """Check what a header says.

    Raises InvalidAdapterError with every complaint about the first thing that is wrong: the JSON, the entries, or the
    layout.
    """
    raw, file_bytes = header
    if (count := raw.count(b'"data_offsets"')) > limits.max_tensors:  # before any object is made of them
        raise _refusal(f"the file holds {count} tensors, more than {limits.max_tensors}")
    document = loads(
        raw, what=f"{WEIGHTS_FILE}: the header", max_bytes=limits.max_header_bytes, max_depth=MAX_HEADER_DEPTH
    )
    tensors = _read_entries(document, limits)
    data_offset = LENGTH_BYTES + len(raw)
    _check_layout(tensors, file_bytes - data_offset)
    return Header(tensors, data_offset, file_bytes)


def iter_tensors(path: Path, header: Header) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors one by one, each in memory of its own; InvalidAdapterError if the file is not what it was."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size != header.file_bytes:
            raise _refusal("the file changed while it was read")
        file.seek(header.data_offset)
        for name, info in header.tensors.items():
            pause()
            content = bytearray(info.end - info.begin)
            _fill(file, memoryview(content))
            flat = torch.frombuffer(content, dtype=info.dtype) if content else torch.empty(0, dtype=info.dtype)
            yield name, flat.view(info.shape)


def read_tensors(path: Path, header: Header) -> dict[str, Tensor]:
    """All tensors of the file by name, in the file's dtypes; their values are not looked at."""
    return dict(iter_tensors(path, header))


def _refusal(*complaints: str) -> InvalidAdapterError:
    return InvalidAdapterError([f"{WEIGHTS_FILE}: {complaint}" for complaint in capped(complaints)])


def _read_header_bytes(file: FileIO, file_bytes: int, limits: Limits) -> bytes:
    if file_bytes < LENGTH_BYTES:
        raise _refusal(f"the file has {file_bytes} bytes, too few for a safetensors header")
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if length > file_bytes - LENGTH_BYTES:
        raise _refusal("the header is longer than the file; is it a safetensors file?")
    if length > limits.max_header_bytes:
        raise _refusal(f"the header is longer than {limits.max_header_bytes} bytes")
    raw = bytearray(length)
    _fill(file, memoryview(raw))
    if not raw.startswith(b"{"):
        raise _refusal("the header does not start with {; is it a safetensors file?")
    return bytes(raw)


def _fill(file: FileIO, buffer: memoryview) -> None:
    """Read exactly as many bytes as the buffer takes."""
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise _refusal("the file ends too early")
        buffer = buffer[count:]


def _read_entries(document: dict[str, Any], limits: Limits) -> dict[str, TensorInfo]:
    """The tensors in the order of their bytes, each sound in itself."""
    complaints = _metadata_complaints(document.pop("__metadata__", {}))
    if not document:
        complaints.append("the file holds no tensors")
    if len(document) > limits.max_tensors:
        raise _refusal(f"the file holds {len(document)} tensors, more than {limits.max_tensors}")
    tensors = {}
    for name, entry in document.items():
        complaint = _name_complaint(name, limits) or _entry_complaint(entry)
        if complaint:
            complaints.append(f"{quoted(name)} {complaint}")
        else:
            tensors[name] = TensorInfo(DTYPES[entry["dtype"]], tuple(entry["shape"]), *entry["data_offsets"])
    if complaints:
        raise _refusal(*complaints)
    return dict(sorted(tensors.items(), key=lambda item: item[1][2:]))


def _metadata_complaints(metadata: object) -> list[str]:
    if isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()):
        return []
    return ["__metadata__ must map strings to strings"]


def _name_complaint(name: str, limits: Limits) -> str | None:
    if not 0 < len(name) <= limits.max_name_chars:
        return f"must have 1 to {limits.max_name_chars} characters"
    return None if name.isprintable() else "holds characters that cannot be printed"


def _entry_complaint(entry: object) -> str | None:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "must have dtype, shape and data_offsets, and nothing else"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"has dtype {quoted(str(dtype))}, supported are {', '.join(DTYPES)}"
    if not (_is_shape(shape) or _is_empty_matrix(shape)):
        return f"must have a shape of 1 to {MAX_DIMENSIONS} positive integers, or be a matrix of no rows or columns"
    if not _are_integers(offsets, at_least=0) or len(offsets) != 2:
        return "must have data_offsets of two integers, neither negative"
    found, needed = offsets[1] - offsets[0], math.prod(shape) * DTYPES[dtype].itemsize
    return None if found == needed else f"has {found} bytes, its shape and dtype need {needed}"


def _is_shape(sizes: object) -> TypeGuard[list[int]]:
    return _are_integers(sizes, at_least=1) and 0 < len(sizes) <= MAX_DIMENSIONS


def _is_empty_matrix(sizes: object) -> TypeGuard[list[int]]:
    """AdaLoRA saves one where it has left a module no rank."""
    return _are_integers(sizes, at_least=0) and len(sizes) == 2 and 0 in sizes and max(sizes) <= MAX_EMPTY_SIZE


def _are_integers(values: object, at_least: int) -> TypeGuard[list[int]]:
    return isinstance(values, list) and {*map(type, values)} <= {int} and min(values, default=at_least) >= at_least


def _check_layout(tensors: Mapping[str, TensorInfo], data_bytes: int) -> None:
    """Raise unless the tensors follow one another without gap or overlap and end where the file ends."""
    complaints = []
    position = 0
    for name, info in tensors.items():
        if info.begin != position:
            complaints.append(f"{quoted(name)} starts at byte {info.begin}, the one before it ends at {position}")
        position = info.end
    if position != data_bytes:
        complaints.append(f"the tensors end at byte {position}, the file at {data_bytes}")
    if complaints:
        raise _refusal(*complaints)
