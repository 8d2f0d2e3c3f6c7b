"""`swaplora serve` in a process of its own, as a user starts it."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from repository import ROOT

SMALL = ("--dtype", "fp32", "--kv-cache-bytes", "4MiB")


@contextmanager
def free_port() -> Iterator[int]:
    """A port that is kept for who listens on it in the block: nobody else is given it in the meantime."""
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        port: int = keeper.getsockname()[1]
        yield port


@contextmanager
def process(base: Path, data_dir: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """`swaplora serve` as a user starts it, on a free port; ready."""
    with starting(str(base), data_dir, *flags) as (server, client):
        wait_ready(server, client)
        yield server, client


@contextmanager
def starting(base: str, data_dir: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """The same, from its first moment on."""
    cache = ROOT / ".cache"
    command = [sys.executable, "-m", "swaplora_server", "serve", base]
    command += ["--data-dir", str(data_dir), "--cache-dir", str(cache), *flags]
    with free_port() as port:
        server = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
                yield server, client
        finally:
            server.kill()
            server.wait()


def wait_ready(server: subprocess.Popen[bytes], client: httpx.Client) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server ended while starting"
        try:
            if client.get("/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("the server did not become ready")
