"""A stand-in for a running server, and the command line that talks to it: no model, no torch."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from typer.testing import CliRunner, Result

from swaplora_server.cli import app
from swaplora_server.cli.serve import spread_values

CARD = {
    "name": "sql",
    "version": 2,
    "state": "resident",
    "pinned": False,
    "rank": 8,
    "bytes": 1536,
    "in_flight": 3,
    "digest": "sha256:" + "ab" * 32,
    "last_failure": None,
    "versions": [{"version": 1}, {"version": 2}],
}


@dataclass
class Call:
    """A request as the stand-in server got it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class FakeServer:
    """Answers every request from a table of (method, path) and remembers what was asked."""

    url: str = ""
    answers: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    retry_after: list[str] = field(default_factory=list)  # what the first answers say, each a 429

    def answer(self, method: str, path: str, content: object, status: int = 200) -> None:
        self.answers[method, path] = status, content if isinstance(content, str) else json.dumps(content)

    def refuse(self, method: str, path: str, status: int, message: str, code: str) -> None:
        self.answer(method, path, {"error": {"message": message, "code": code}}, status)

    @property
    def bodies(self) -> list[object]:
        """What was sent as JSON, in order."""
        return [json.loads(call.body) for call in self.calls if call.body]


@contextmanager
def run_fake_server() -> Iterator[FakeServer]:
    """A stand-in on a free port; it answers 404 until it is told what to say."""
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            fake.calls.append(Call(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            status, content = fake.answers.get((self.command, self.path), (404, "no such page"))
            wait = fake.retry_after.pop(0) if fake.retry_after else None
            self.send_response(status if wait is None else 429)
            if wait is not None:
                self.send_header("Retry-After", wait)
            self.end_headers()
            self.wfile.write(content.encode())

        do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = answer

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on stderr, which belongs to the command under test."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        fake.url = f"http://127.0.0.1:{http.server_port}"
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield fake
        finally:
            http.shutdown()
            thread.join()


def swaplora(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, spread_values(args), input=stdin)
