"""Bodies that come compressed, decoded as they come: a piece at a time, so that a bomb has no room."""

import asyncio
import zlib
from collections.abc import AsyncIterator

from fastapi import Request

from swaplora_server.service.errors import RequestError

_PIECE_BYTES = 64 << 10
_GZIP = 16 + zlib.MAX_WBITS
_HEADER = "Content-Encoding"


async def body_chunks(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body's bytes, decoded if they are gzip's; how many come out is for the caller to bound.

    Raises RequestError for another encoding, for what is not gzip or not whole, and for more than `limit` bytes of it.
    """
    encoding = ",".join(request.headers.getlist(_HEADER)).strip().lower()
    if encoding in ("", "identity"):
        chunks: AsyncIterator[bytes] = request.stream()
    elif encoding in ("gzip", "x-gzip"):
        chunks = _gunzip(request, limit)
    else:
        message = f"the {_HEADER} {encoding[:64]!r} is not read here; send the body as gzip or as it is"
        raise RequestError("unsupported_media_type", message, _HEADER)
    async for chunk in chunks:
        yield chunk


async def _gunzip(request: Request, limit: int) -> AsyncIterator[bytes]:
    decoder, num_sent = zlib.decompressobj(_GZIP), 0
    try:
        async for chunk in request.stream():
            num_sent += len(chunk)
            if num_sent > limit:
                raise RequestError("body_too_large", f"the body is larger than {limit} bytes")
            while chunk and not decoder.unused_data:
                yield decoder.decompress(chunk, _PIECE_BYTES)
                chunk = decoder.unconsumed_tail
                await asyncio.sleep(0)  # others run between two pieces
    except zlib.error as error:
        raise _not_gzip("the body is not gzip") from error
    if not decoder.eof or decoder.unused_data:
        raise _not_gzip("the body is cut short" if not decoder.eof else "something follows the body's gzip")


def _not_gzip(reason: str) -> RequestError:
    return RequestError("invalid_request", f"{reason}, which its {_HEADER} says it is", _HEADER)
