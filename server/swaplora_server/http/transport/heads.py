"""What the head of a request must be, and what is in a scope of it."""

import re
from collections.abc import MutableSequence

from swaplora_server.service.errors import RequestError

MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 256
_END_OF_AUTHORITY = re.compile(rb"[/?#]")


def check_head(url: bytes, headers: MutableSequence[tuple[bytes, bytes]], version: str) -> None:
    """Raise RequestError for a head that is too large, or that others on the way might understand otherwise.

    A host that `url` names takes the place of what the Host header says.
    """
    num_bytes = len(url) + sum(len(name) + len(value) + 4 for name, value in headers)
    if num_bytes > MAX_HEAD_BYTES:
        raise too_large(f"{MAX_HEAD_BYTES} bytes")
    if len(headers) > MAX_HEADERS:
        raise too_large(f"{MAX_HEADERS} headers")
    coding = joined(headers, b"transfer-encoding")
    if coding and (coding.lower() != b"chunked" or version == "1.0"):
        raise RequestError("invalid_request", "Transfer-Encoding can only be chunked, and only in HTTP/1.1")
    num_hosts = sum(name == b"host" for name, _ in headers)
    if num_hosts > 1 or (num_hosts == 0 and version != "1.0"):
        raise RequestError("invalid_request", "a request has one Host header")
    _, is_absolute, rest = url.partition(b"://")
    if is_absolute and not url.startswith(b"/"):
        authority = _END_OF_AUTHORITY.split(rest, maxsplit=1)[0]
        headers[:] = [header for header in headers if header[0] != b"host"] + [(b"host", authority)]


def joined(headers: MutableSequence[tuple[bytes, bytes]], name: bytes) -> bytes:
    """All that the headers of this name say."""
    return b",".join(value for found, value in headers if found == name)


def too_large(limit: str) -> RequestError:
    """What is told whose head passes `limit`."""
    return RequestError("headers_too_large", f"the request's line and headers are more than {limit}")
