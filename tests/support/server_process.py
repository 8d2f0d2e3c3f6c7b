"""`swaplora serve` in a process of its own: as a user starts it, or forked from one that has imported what it needs."""

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from forked import Forked
from repository import ROOT

SMALL = ("--dtype", "fp32", "--kv-cache-bytes", "4MiB")


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A port that is kept for who listens on it in the block: nobody else is given it in the meantime."""
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        port: int = keeper.getsockname()[1]
        yield port


@contextlib.contextmanager
def process(base: Path, data_dir: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """`swaplora serve` as a user starts it, on a free port; ready."""
    with starting(str(base), data_dir, *flags) as (server, client):
        wait_ready(server, client)
        yield server, client


@contextlib.contextmanager
def starting(base: str, data_dir: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """The same, from its first moment on."""
    command = [sys.executable, "-m", "swaplora_server", "serve", *_arguments(base, data_dir), *flags]
    with free_port() as port:
        server = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
                yield server, client
        finally:
            server.kill()
            server.wait()


@contextlib.contextmanager
def forked(base: Path, data_dir: Path, *flags: str) -> Iterator[tuple[Forked, httpx.Client]]:
    """Like `process`, without the seconds that imports take. What an import reads in the environment is as it was."""
    with free_port() as port:
        server = forked_program("serve", *_arguments(str(base), data_dir), *flags, "--port", str(port))
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
                wait_ready(server, client)
                yield server, client
        finally:
            server.kill()
            server.wait()


def refused(base: Path, data_dir: Path, *flags: str) -> str:
    """What `swaplora serve` tells when it ends at once, as it must, with status 1."""
    with tempfile.NamedTemporaryFile("r+") as told:
        assert forked_program("serve", *_arguments(str(base), data_dir), *flags, told=told.fileno()).wait() == 1
        told.seek(0)
        return told.read()


def forked_program(*arguments: str, told: int = subprocess.DEVNULL) -> Forked:
    """`swaplora ARGUMENTS`. What it writes to stderr goes into the file `told`."""
    command = [sys.executable, "-m", "swaplora_server", *arguments]
    return Forked(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=told)


def _arguments(base: str, data_dir: Path) -> list[str]:
    return [base, "--data-dir", str(data_dir), "--cache-dir", str(ROOT / ".cache")]


def wait_ready(server: "subprocess.Popen[bytes] | Forked", client: httpx.Client) -> None:
    """However long it takes: a machine may be busy."""
    while True:
        assert server.poll() is None, "the server ended while starting"
        try:
            if client.get("/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
