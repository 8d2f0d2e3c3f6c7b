"""`swaplora serve` in a process of its own: as a user starts it, or forked from one that has imported what it needs."""

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

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
def forked(base: Path, data_dir: Path, *flags: str) -> Iterator[tuple["Forked", httpx.Client]]:
    """Like `process`, without the seconds that imports take. What an import reads in the environment is as it was."""
    with free_port() as port:
        server = Forked(["serve", *_arguments(str(base), data_dir), *flags, "--port", str(port)])
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
                wait_ready(server, client)
                yield server, client
        finally:
            server.kill()
            server.wait()


def refused(base: Path, data_dir: Path, *flags: str) -> str:
    """What `swaplora serve` tells when it ends at once, as it must, with status 1."""
    with tempfile.NamedTemporaryFile("r") as told:
        assert Forked(["serve", *_arguments(str(base), data_dir), *flags], told.name).wait() == 1
        return told.read()


def _arguments(base: str, data_dir: Path) -> list[str]:
    return [base, "--data-dir", str(data_dir), "--cache-dir", str(ROOT / ".cache")]


# For each message it forks a process that forks the server, says its number on the socket that came, and waits for it.
_TEMPLATE = """
import contextlib, gc, json, os, socket, sys
gc.disable()
import transformers.models.llama.modeling_llama
from swaplora_server import cli, serve
gc.freeze()  # a collector that goes through it would have each server copy it
gc.enable()

control = socket.socket(fileno=int(sys.argv[1]))
while (message := socket.recv_fds(control, 1 << 20, 1))[0]:
    if not os.fork():
        break
    os.close(message[1][0])
else:
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    sys.exit()
control.close()
answers = socket.socket(fileno=message[1][0])
if pid := os.fork():
    answers.send(b"%d" % pid)
    answers.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)
answers.close()
sys.argv[1:], environment, told = json.loads(message[0])
for descriptor, path in enumerate((os.devnull, os.devnull, told)):
    os.dup2(os.open(path, os.O_RDWR), descriptor)
os.environ.clear()
os.environ.update(environment)
cli.main()
"""


@functools.cache
def _template() -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
    """One for all servers of this process; it ends with this process, which closes the socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-c", _TEMPLATE, str(theirs.fileno())]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        return ours, subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])


class Forked:
    """A process that is no child of this one, with what `subprocess.Popen` has for those that are.

    What it writes to stderr goes into the file `told`, which is there.
    """

    def __init__(self, arguments: Sequence[str], told: str = os.devnull) -> None:
        self._answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            message = json.dumps([arguments, dict(os.environ), told]).encode()
            socket.send_fds(_template()[0], [message], [theirs.fileno()])
        self.pid = int(self._answers.recv(100))
        self._status: int | None = None

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._ended(timeout)
        assert status is not None, f"runs on after {timeout} s"
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and its number is still on the way
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> int | None:
        if self._status is None and select.select([self._answers], [], [], timeout)[0]:
            self._status = int(self._answers.recv(100))
            self._answers.close()
        return self._status


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
