"""HTTP by hand, over a socket: what no client library would send, or would not stop sending."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

GUARD_SECONDS = 60


@contextmanager
def connected(url: str, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    """A connection to the server at `url`."""
    parts = urlsplit(url)
    with socket.socket() as connection:
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(GUARD_SECONDS)
        connection.connect((parts.hostname, parts.port))
        yield connection


def request(path: str, body: Any = None, *, method: str = "POST", version: str = "1.1", **headers: str) -> bytes:
    """A whole request; `body` as JSON if it is not bytes already. Headers that are given win; `_` stands for `-`."""
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    known = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(content))}
    known |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/{version}", *(f"{name}: {value}" for name, value in known.items())]
    return "\r\n".join([*lines, "", ""]).encode() + content


def read_to_end(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection, or cuts it."""
    received = b""
    try:
        while piece := connection.recv(1 << 16):
            received += piece
    except ConnectionError:
        pass
    return received


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    """Status and body of the next answer, which has a Content-Length."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += _some(connection, 1)
    head, _, body = received.partition(b"\r\n\r\n")
    lengths = [line.partition(b":")[2] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    while len(body) < int(lengths[0]):
        body += _some(connection, int(lengths[0]) - len(body))
    return int(head.split()[1]), body


def _some(connection: socket.socket, most: int) -> bytes:
    piece = connection.recv(most)
    assert piece, "the server closed the connection before it had answered"
    return piece
