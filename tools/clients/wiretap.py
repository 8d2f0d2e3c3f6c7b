"""Bytes passed on between clients and a server as they come, and the requests that went by."""

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import parse_headers
from io import BytesIO
from typing import Any

CHUNK = 1 << 16
STATUS = re.compile(rb"^HTTP/1\.1 (\d{3}) ", re.MULTILINE)


@dataclass(frozen=True)
class Heard:
    """A request that a client sent."""

    path: str
    body: dict[str, Any]


@dataclass
class Wire:
    """What went over one connection since it was last looked at."""

    sent: bytearray = field(default_factory=bytearray)
    answered: bytearray = field(default_factory=bytearray)


@dataclass
class Wiretap:
    """Listens at `url`; what comes is the server's, byte by byte."""

    server_port: int
    url: str = ""
    wires: list[Wire] = field(default_factory=list)

    def take(self) -> tuple[list[Heard], list[int]]:
        """The POSTs since the last time, and the statuses of all answers."""
        sent, answered = [bytes(wire.sent) for wire in self.wires], [bytes(wire.answered) for wire in self.wires]
        for wire in self.wires:
            wire.sent.clear()
            wire.answered.clear()
        heard = [request for each in sent for request in requests(each)]
        return heard, [int(status) for each in answered for status in STATUS.findall(each)]

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = Wire()
        self.wires.append(wire)
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self.server_port)
        await asyncio.gather(_pass(reader, to_server, wire.sent), _pass(from_server, writer, wire.answered))


def requests(sent: bytes) -> Iterator[Heard]:
    """The POSTs among what one client sent on one connection. Raises ValueError for one without a length."""
    stream = BytesIO(sent)
    while line := stream.readline():
        method, path, _ = line.decode("ascii").split()
        headers = parse_headers(stream)
        if headers.get("Transfer-Encoding"):
            raise ValueError(f"{method} {path} came in chunks")
        body = stream.read(int(headers.get("Content-Length", 0)))
        if method == "POST":
            yield Heard(path, json.loads(body))


@contextmanager
def tapped(server_port: int) -> Iterator[Wiretap]:
    """A wiretap in a thread of its own."""
    tap, loop = Wiretap(server_port), asyncio.new_event_loop()
    listener = loop.run_until_complete(asyncio.start_server(tap.relay, "127.0.0.1", 0))
    tap.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield tap
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        listener.close()
        loop.run_until_complete(_end(loop))
        loop.close()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, copy: bytearray) -> None:
    try:
        while chunk := await reader.read(CHUNK):
            copy += chunk
            writer.write(chunk)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


async def _end(loop: asyncio.AbstractEventLoop) -> None:
    """Of the connections that are still open."""
    relays = asyncio.all_tasks(loop) - {asyncio.current_task()}
    for relay in relays:
        relay.cancel()
    await asyncio.gather(*relays, return_exceptions=True)
