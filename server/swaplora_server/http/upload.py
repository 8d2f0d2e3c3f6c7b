"""Streaming a multipart upload to disk: two parts, every length bounded, the client's file names never looked at."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import ExitStack

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from swaplora_adapters.config.parse import MAX_CONFIG_BYTES
from swaplora_adapters.store.staging import Part, Staging, Writer
from swaplora_server.http.transport.encoding import body_chunks
from swaplora_server.service.errors import RequestError

_MAX_HEADER_BYTES = 8 << 10
_MAX_FRAME_BYTES = 1 << 20  # what a body may hold beside the two files
_MAX_TYPE_CHARS = 1024  # of the Content-Type, which is parsed while nothing else runs
_REMEDY = "send exactly two parts: config (adapter_config.json) and weights (adapter_model.safetensors)"


async def receive_files(request: Request, staging: Staging, max_weights_bytes: int, threads: Executor) -> None:
    """Write the request's parts `config` and `weights` into `staging`, in `threads`.

    Raises RequestError for anything but these two parts, AdapterTooLargeError and StorageFullError.
    """
    limits: dict[Part, int] = {"config": MAX_CONFIG_BYTES, "weights": max_weights_bytes}
    parts = _Parts(staging, limits)
    loop = asyncio.get_running_loop()
    with parts.open_file:
        try:
            parser = MultipartParser(_boundary(request), parts.callbacks())
            async for chunk in _bounded_body(request, sum(limits.values()) + _MAX_FRAME_BYTES):
                await loop.run_in_executor(threads, parser.write, chunk)
            await loop.run_in_executor(threads, parser.finalize)
        except FormParserError as error:
            raise RequestError("invalid_request", f"the body is not well-formed multipart; {_REMEDY}") from error
    parts.check_complete()


async def _bounded_body(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    """The body's chunks; what lies around the parts is skipped by the parser, and has to end too."""
    num_bytes = 0
    async for chunk in body_chunks(request, max_bytes):
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise RequestError("body_too_large", f"the body is larger than {max_bytes} bytes; {_REMEDY}")
        yield chunk


def _boundary(request: Request) -> bytes:
    content_type = request.headers.get("content-type", "")
    kind, options = parse_options_header(content_type if len(content_type) <= _MAX_TYPE_CHARS else "")
    boundary: bytes = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise RequestError("invalid_request", f"the body must be multipart/form-data; {_REMEDY}")
    return boundary


class _Parts:
    """The parser's callbacks: one part at a time goes into its file in the staging folder."""

    def __init__(self, staging: Staging, limits: dict[Part, int]) -> None:
        self._staging = staging
        self._limits = limits
        self._received: set[Part] = set()
        self._is_finished = False
        self._header_name = b""
        self._header_value = b""
        self._num_header_bytes = 0
        self._disposition: bytes | None = None
        self._writer: Writer | None = None
        self.open_file = ExitStack()

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._open,
            "on_part_data": self._write,
            "on_part_end": self._close,
            "on_end": self._finish,
        }

    def check_complete(self) -> None:
        missing = sorted(self._limits.keys() - self._received)
        if missing or not self._is_finished:
            what = f"part {' and '.join(missing)} is missing" if missing else "the body ends early"
            raise RequestError("invalid_request", f"{what}; {_REMEDY}", missing[0] if missing else None)

    def _begin(self) -> None:
        self._disposition = None
        self._num_header_bytes = 0

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += self._bounded(data[start:end])

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += self._bounded(data[start:end])

    def _bounded(self, piece: bytes) -> bytes:
        self._num_header_bytes += len(piece)
        if self._num_header_bytes > _MAX_HEADER_BYTES:
            raise RequestError(
                "invalid_request", f"a part's headers are larger than {_MAX_HEADER_BYTES} bytes; {_REMEDY}"
            )
        return piece

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _open(self) -> None:
        sent = _part_name(self._disposition)
        name = next((part for part in self._limits if part == sent), None)
        if name is None:
            raise RequestError("invalid_request", f"there is a part of another name; {_REMEDY}")
        if name in self._received:
            raise RequestError("invalid_request", f"part {name} is sent twice; {_REMEDY}", name)
        self._received.add(name)
        self._writer = self.open_file.enter_context(self._staging.writer(name, self._limits[name]))

    def _write(self, data: bytes, start: int, end: int) -> None:
        assert self._writer is not None
        self._writer.write(data[start:end])

    def _close(self) -> None:
        self.open_file.close()

    def _finish(self) -> None:
        self._is_finished = True


def _part_name(disposition: bytes | None) -> str | None:
    kind, options = parse_options_header(disposition)
    return options.get(b"name", b"").decode("latin-1") if kind == b"form-data" else None
