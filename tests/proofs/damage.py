"""Ways to spoil an upload: its weights file, its two files, and the request that carries them."""

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from adapter_files import safetensors_bytes

NAME = "hostile"
Damage = Callable[[bytes], bytes]


class Files(NamedTuple):
    """The bytes of an adapter's two files."""

    config: bytes
    weights: bytes


def framed(change: Callable[[dict[str, Any]], object], extra: bytes = b"") -> Damage:
    """Change a weights file's header as JSON, into an object or into bytes, and add `extra` to its data."""

    def damage(weights: bytes) -> bytes:
        start = 8 + int.from_bytes(weights[:8], "little")
        return safetensors_bytes(change(json.loads(weights[8:start])), weights[start:] + extra)

    return damage


def raw_entry(text: str) -> Damage:
    """Put JSON text before the first entry of the header."""
    return framed(lambda header: ("{" + text + "," + json.dumps(header)[1:]).encode())


def entry(number: int, **fields: Any) -> Damage:
    """Change fields of one tensor in the header."""

    def change(header: dict[str, Any]) -> object:
        name = tensor_names(header)[number]
        return header | {name: header[name] | fields}

    return framed(change)


def shifted(number: int, by: int, extra: bytes = b"") -> Damage:
    """Move the offsets of one tensor in the header by so many bytes."""

    def change(header: dict[str, Any]) -> object:
        name = tensor_names(header)[number]
        offsets = [offset + by for offset in header[name]["data_offsets"]]
        return header | {name: header[name] | {"data_offsets": offsets}}

    return framed(change, extra)


def tensor_names(header: Mapping[str, Any]) -> list[str]:
    """The names in the order of the tensors' bytes."""
    names = [name for name in header if name != "__metadata__"]
    return sorted(names, key=lambda name: header[name]["data_offsets"])


def tensors(change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Damage:
    """Change the tensors, and write a file whose frame is sound."""
    return lambda weights: save(dict(change(load(weights))))


def each(change: Callable[[Tensor], Tensor]) -> Damage:
    """Change every tensor."""
    return tensors(lambda found: {name: change(tensor).contiguous() for name, tensor in found.items()})


def added(name: str, *shape: int) -> Damage:
    """Add a tensor of ones, or put it in the place of one."""
    return tensors(lambda found: found | {name: torch.ones(shape)})


def filled(value: float, part: str = "lora_B") -> Damage:
    """Fill the tensors with `part` in their names with one value."""
    return tensors(lambda found: {name: t.fill_(value) if part in name else t for name, t in found.items()})


def renamed(old: str, new: str) -> Damage:
    """Replace `old` in every name."""
    return tensors(lambda found: {name.replace(old, new): tensor for name, tensor in found.items()})


def without(part: str) -> Damage:
    """Leave out every tensor with `part` in its name."""
    return tensors(lambda found: {name: tensor for name, tensor in found.items() if part not in name})


def strangers(count: int, name: str) -> bytes:
    """A sound file of `count` tensors that no base has; `name` is a format with the tensor's number in it."""
    fields = {"dtype": "F16", "shape": [1, 1]}
    header = {name.format(n): fields | {"data_offsets": [2 * n, 2 * n + 2]} for n in range(count)}
    return safetensors_bytes(header, bytes(2 * count))


def zipped(content: bytes) -> bytes:
    """A pickle as `torch.save` wraps it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("adapter_model/data.pkl", content)
    return buffer.getvalue()


class Bomb:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("unpickled",)


def part(name: str, content: bytes, extra: str = "") -> tuple[str, bytes]:
    """A part's headers and content; `extra` follows the name, with more parameters or more headers."""
    return f'Content-Disposition: form-data; name="{name}"{extra}', content


def form(*parts: tuple[str, bytes], end: bytes = b"--X--\r\n") -> bytes:
    """A multipart body."""
    pieces = (b"--X\r\n%b\r\n\r\n%b\r\n" % (headers.encode("latin-1"), content) for headers, content in parts)
    return b"".join(pieces) + end


def both(files: Files, extra: str = "", end: bytes = b"--X--\r\n") -> bytes:
    """The multipart body that an upload ought to have, but for what is added."""
    return form(part("config", files.config, extra), part("weights", files.weights, extra), end=end)


def put(
    body: bytes,
    *headers: str,
    url: str = f"/v1/adapters/{NAME}",
    method: str = "PUT",
    kind: str = "multipart/form-data; boundary=X",
    length: str | None = "",
) -> bytes:
    """A request on the wire. Its Content-Length is right unless given, and left out if None."""
    lengths = [] if length is None else [f"Content-Length: {length or len(body)}"]
    lines = [f"{method} {url} HTTP/1.1", "Host: x", f"Content-Type: {kind}", *lengths, *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def chunked(body: bytes, *headers: str, size: str = "") -> bytes:
    """The same in one chunk, with its size written as given."""
    chunk = f"{size or format(len(body), 'x')}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    return put(chunk, "Transfer-Encoding: chunked", *headers, length=None)
