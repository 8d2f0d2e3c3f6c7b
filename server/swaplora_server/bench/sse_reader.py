"""Server-sent events out of the bytes of a response, wherever the network cuts them."""

import re
from collections.abc import Iterator

_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventReader:
    """Reads an event stream as the HTML standard defines it; only the events' data is of interest here."""

    def __init__(self) -> None:
        self._line = b""  # as much as has come of it
        self._data: list[bytes] = []
        self._is_after_cr = False

    def feed(self, received: bytes) -> Iterator[bytes]:
        """The data of each event that ends within `received`, several data lines of one joined by newlines."""
        if self._is_after_cr and received.startswith(b"\n"):
            received = received[1:]  # the second half of a line's end
            self._is_after_cr = False
        if received:
            self._is_after_cr = received.endswith(b"\r")
        *lines, self._line = _LINE_END.split(self._line + received)
        for line in lines:
            if line:
                self._read_line(line)
            elif self._data:
                yield b"\n".join(self._data)
                self._data = []

    def _read_line(self, line: bytes) -> None:
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" "))
