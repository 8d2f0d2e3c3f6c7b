"""What a server says of itself before it is measured: its version, and the kernels that compute."""

import json
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any

from swaplora_server.bench.answer import MAX_WORDS
from swaplora_server.bench.connection import Endpoint

FIELDS = ("version", "device", "dtype", "kernels")
SECONDS = 10.0
MAX_BYTES = 64 << 10


def describe_server(endpoint: Endpoint) -> dict[str, str | None]:
    """`FIELDS` as `GET /version` has them, each None if this server does not say, or is not there."""
    content = _version(endpoint)
    said = {name: content.get(name) for name in FIELDS} if isinstance(content, dict) else {}
    return {name: value[:MAX_WORDS] if isinstance(value := said.get(name), str) else None for name in FIELDS}


def _version(endpoint: Endpoint) -> Any:
    try:
        with closing(_connect(endpoint)) as connection:
            connection.request("GET", f"{endpoint.path}/version")
            return json.loads(connection.getresponse().read(MAX_BYTES))
    except (OSError, HTTPException, ValueError):  # what matters here shows, and is told, when it is measured
        return None


def _connect(endpoint: Endpoint) -> HTTPConnection:
    if endpoint.tls is None:
        return HTTPConnection(endpoint.host, endpoint.port, timeout=SECONDS)
    return HTTPSConnection(endpoint.host, endpoint.port, timeout=SECONDS, context=endpoint.tls)
