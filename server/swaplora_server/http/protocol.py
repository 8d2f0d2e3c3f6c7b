"""uvicorn's HTTP/1.1 protocol with a bound on a request's head, which it has none for, and the one error body."""

import json
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from swaplora_server.http.errors import error_body

MAX_HEAD_BYTES = 64 << 10


class BoundedHttpProtocol(HttpToolsProtocol):
    """Refuses a request whose line and headers are larger than `MAX_HEAD_BYTES`, before they have all arrived."""

    _num_head_bytes: int | None = None  # None while no head is being received

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_head_bytes = 0

    def on_headers_complete(self) -> None:
        self._num_head_bytes = None
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._num_head_bytes is None:
            return
        self._num_head_bytes += len(data)
        if self._num_head_bytes > MAX_HEAD_BYTES:
            self._num_head_bytes = None
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"headers are larger than {MAX_HEAD_BYTES} bytes")

    def send_400_response(self, msg: str) -> None:
        """What cannot be read as HTTP."""
        self._refuse(HTTPStatus.BAD_REQUEST, msg)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        body = json.dumps(error_body("invalid_request", message)).encode()
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
