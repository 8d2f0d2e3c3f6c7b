"""Python's modules as programs, forked from a process that has imported what they need: without the seconds of that.

What an import reads in the environment is as it was then. All else is as if Python had begun for them.
"""

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import IO

_LOCK = threading.Lock()  # of whoever starts the first
# For each message it forks a process that forks the program, says its number on the socket that came, and waits for it.
_TEMPLATE = """
import contextlib, fcntl, gc, json, os, runpy, socket, sys
gc.disable()
import peft, transformers.models.llama.modeling_llama
from swaplora_server import cli, serve
gc.freeze()  # a collector that goes through it would have each program copy it
gc.enable()
sys.path.remove("")

control = socket.socket(fileno=int(sys.argv[1]))
while (received := socket.recv_fds(control, 1 << 20, 20))[0]:
    if not os.fork():
        break
    for descriptor in received[1]:
        os.close(descriptor)
else:
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    sys.exit()
control.close()
message, (answers, *descriptors), *_ = received
if pid := os.fork():
    for descriptor in descriptors:
        os.close(descriptor)
    os.write(answers, b"%d" % pid)
    os.write(answers, b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)
os.close(answers)
command, environment, places, is_leader = json.loads(message)
if is_leader:
    os.setsid()
apart = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 1 + max(places)) for descriptor in descriptors]
for descriptor in descriptors:
    os.close(descriptor)
for descriptor, place in zip(apart, places, strict=True):
    os.dup2(descriptor, place)
    os.close(descriptor)
os.environ.clear()
os.environ.update(environment)
sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
sys.orig_argv[:] = command
sys.argv[:] = command[command.index("-m") + 1 :]
sys.modules.pop("sitecustomize", None)
with contextlib.suppress(ModuleNotFoundError):
    import sitecustomize
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@functools.cache
def _template() -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
    """One for all programs of this process; it ends with this process, which closes the socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-c", _TEMPLATE, str(theirs.fileno())]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        return ours, subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])


class Forked:
    """A process that is no child of this one, with what `subprocess.Popen` has for those that are.

    `command` is Python's, of a module: `[sys.executable, "-m", NAME, ...]`. The rest is as of Popen.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        start_new_session: bool = False,
    ) -> None:
        self.stdin: IO[bytes] | None = None
        places = [0, 1, 2, *pass_fds]
        message = json.dumps([list(command), dict(os.environ if env is None else env), places, start_new_session])
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.ExitStack() as opened, theirs:
            if stdin == subprocess.PIPE:
                stdin, write_end = os.pipe()
                opened.callback(os.close, stdin)
                self.stdin = open(write_end, "wb")  # noqa: SIM115  # whoever has this closes it
            nothing = os.open(os.devnull, os.O_RDWR)
            opened.callback(os.close, nothing)
            standard = [nothing if given == subprocess.DEVNULL else given for given in (stdin, stdout, stderr)]
            own = [place if given is None else given for place, given in enumerate(standard)]
            with _LOCK:
                template, _ = _template()
            socket.send_fds(template, [message.encode()], [theirs.fileno(), *own, *pass_fds])
        self._answers = ours.detach()  # which threads may wait on while another reads it
        weakref.finalize(self, os.close, self._answers)
        self._status: int | None = None
        self._reading = threading.Lock()
        self.pid = int(os.read(self._answers, 100))

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._ended(timeout)
        assert status is not None, f"runs on after {timeout} s"
        return status

    def communicate(self) -> None:
        """Close its stdin, and wait for its end."""
        if self.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.stdin.close()
        self.wait()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and its number is still on the way
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> int | None:
        if self._status is None and select.select([self._answers], [], [], timeout)[0]:
            with self._reading:
                if self._status is None:
                    self._status = int(os.read(self._answers, 100))
        return self._status
