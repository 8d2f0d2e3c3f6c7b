"""A stand-in for the Hugging Face hub, or for any other server, on a free port of this machine."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE

Fault = Literal["hangs", "cut", "endless", "drips", "short"]
_BLOCK = bytes(1 << 16)


@dataclass(frozen=True)
class Answer:
    """What is sent for one request. The faults: no answer at all, a body that breaks off halfway, one without end,
    one of which a byte comes now and then, and one that is declared shorter than it is."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    fault: Fault | None = None


@dataclass(frozen=True)
class Seen:
    """A request that came."""

    path: str
    headers: Mapping[str, str]


class FakeHub:
    """Answers by path. Of several answers to one path each is given once, and the last for ever."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.seen: list[Seen] = []
        self.is_dripping = threading.Event()
        self.is_over = threading.Event()
        self._answers: dict[str, list[Answer]] = {}
        self._lock = threading.Lock()

    def put(self, path: str, *answers: Answer) -> None:
        """Answer requests for `path`, whatever their query."""
        with self._lock:
            self._answers[path] = list(answers)

    def put_repo(self, repo: str, revision: str, commit: str, folder: Path, under: str = "") -> None:
        """Serve an adapter's two files as a repository whose `revision` is `commit`."""
        listing = {"id": repo, "sha": commit}
        self.put(f"/api/models/{repo}/revision/{revision}", Answer(body=json.dumps(listing).encode()))
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            self.put(f"/{repo}/resolve/{commit}/{under}{file}", Answer(body=(folder / file).read_bytes()))

    def count(self, file: str) -> int:
        """How many requests there were for a file of that name."""
        return sum(seen.path.partition("?")[0].endswith("/" + file) for seen in self.seen)

    def once_dripping(self, then: Callable[[], object]) -> None:
        """Call `then` when a first byte has dripped; what was asked for before has been answered by then."""
        threading.Thread(target=lambda: self.is_dripping.wait(60) and then()).start()

    def clock(self) -> SimpleNamespace:
        """A `time` whose clock leaps by an hour when a first byte has dripped."""
        return SimpleNamespace(monotonic=lambda: time.monotonic() + 3600 * self.is_dripping.is_set())

    def answer(self, path: str, headers: Mapping[str, str]) -> Answer:
        """Note a request and choose its answer."""
        with self._lock:
            self.seen.append(Seen(path, headers))
            answers = self._answers.get(path.partition("?")[0])
            if answers is None:
                return Answer(404, headers={"X-Error-Code": "EntryNotFound"})
            return answers.pop(0) if len(answers) > 1 else answers[0]


@contextmanager
def run_fake_hub() -> Iterator[FakeHub]:
    """Start, yield, stop; what hangs is let go."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.run_fake_hub = FakeHub(server.server_port)  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.run_fake_hub  # type: ignore[attr-defined]
        finally:
            server.run_fake_hub.is_over.set()  # type: ignore[attr-defined]
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(with_body=True)

    def do_HEAD(self) -> None:
        self._send(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def _send(self, with_body: bool) -> None:
        run_fake_hub: FakeHub = self.server.run_fake_hub  # type: ignore[attr-defined]
        answer = run_fake_hub.answer(self.path, dict(self.headers))
        self.close_connection = answer.fault is not None
        if answer.fault == "hangs":
            run_fake_hub.is_over.wait(60)
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.fault in ("endless", "drips"):
            self._send_without_end(bytes(1) if answer.fault == "drips" else _BLOCK)
            return
        length = len(answer.body) // 2 if answer.fault == "short" else len(answer.body)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if with_body:
            self.wfile.write(answer.body[: len(answer.body) // 2] if answer.fault == "cut" else answer.body)

    def _send_without_end(self, block: bytes) -> None:
        """Chunks, until the client has had enough."""
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            while not self.server.run_fake_hub.is_over.wait(0.05 if len(block) == 1 else 0):  # type: ignore[attr-defined]
                self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block))
                if len(block) == 1:
                    self.server.run_fake_hub.is_dripping.set()  # type: ignore[attr-defined]
        except (BrokenPipeError, ConnectionResetError):
            return
