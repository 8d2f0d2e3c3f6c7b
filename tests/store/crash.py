"""Adapters' whole life below HTTP, over and over in forks of one process, each of which strace may kill or hurt.

A life takes the `STEPS` through a registry and says after each how it went. What strace does is a `Hurt`: what becomes
of the n-th call of one system call by one thread. Run as a program, this is the process that forks.
"""

import gc
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, Literal

import torch

from adapter_files import LAYERS, config_bytes, write_adapter
from swaplora_adapters.config.parse import parse_spec
from swaplora_adapters.errors import AdapterError
from swaplora_adapters.files.digest import digest_of, hex_of
from swaplora_adapters.files.naming import WEIGHTS_FILE
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.sources.source import Sources
from swaplora_adapters.store.store import Store

# what is done, to which name, and what is added to the life's number for the weights
STEPS = (
    ("put", "fresh", 0.5),
    ("put", "twin", 0.5),
    ("delete", "fresh", 0.0),
    ("delete", "twin", 0.0),
    ("put", "replaced", 0.0),
)
# "start" and "main" are the main thread, from before and from after the opening of the store
Thread = Literal["start", "main", "cleaner"]
# "retry": what failed is taken again; "abandon": nothing is closed at the end
Mode = Literal["plain", "retry", "abandon"]
Allowed = Mapping[str, Set[str | None]]  # name → digests that its current version may have, None where there is none
# the calls that change files, and those around them
SYSCALLS = (
    *("openat", "write", "pwrite64", "fsync", "fdatasync", "fallocate", "ftruncate"),
    *("rename", "renameat2", "link", "linkat", "unlink", "unlinkat", "mkdir", "rmdir"),
)
_MiB = 1 << 20
_HANG_SECONDS = 60


@dataclass(frozen=True)
class Hurt:
    """`effect` is strace's, such as signal=KILL; `when` is "3" for the third call, "3+" for all from it on."""

    thread: Thread
    syscall: str
    effect: str
    when: str


@dataclass(frozen=True)
class Life:
    """How each step went in turn, "ok" or an error's code, or both where it was tried again; how the process ended."""

    outcomes: Sequence[str]
    exit_code: int
    is_hurt: bool  # whether there was such a call


def report(finding: str) -> None:
    """Say what a test found out and does not judge."""
    print(finding)  # noqa: T201 - a test's own output


def why_not() -> str | None:
    """The reason that nothing can be hurt on this machine, if there is one."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"strace may not trace here: {tried.stderr.strip()}"


@contextmanager
def opened(data_dir: Path, keep_versions: int = 1) -> Iterator[tuple[Store, Registry]]:
    """A store and the registry over it, of the base that `adapter_files` fits."""
    store = Store(data_dir)
    registry = Registry(
        store,
        sources=Sources(allowed=(), folder=None, max_weights_bytes=0),
        layers=LAYERS,
        dtype=torch.float32,
        memory_budget=_MiB,
        wait_seconds=30,
        keep_versions=keep_versions,
        base_model="base",
    )
    try:
        yield store, registry
    finally:
        registry.close()


def put(registry: Registry, name: str, number: float) -> None:
    """An upload, from its first file to the answer."""
    with registry.stage() as staging:
        with staging.writer("config", _MiB) as writer:
            writer.write(config_bytes())
        with staging.writer("weights", _MiB) as writer:
            writer.write(weights_bytes(number))
        registry.put(name, staging, source="test")


@cache
def _some_weights() -> bytes:
    with TemporaryDirectory() as folder:
        return (write_adapter(Path(folder)) / WEIGHTS_FILE).read_bytes()


def weights_bytes(number: float) -> bytes:
    """A weights file like no other number's."""
    return _some_weights()[:-4] + struct.pack("<f", number)


def digest_for(number: float) -> str:
    """What an adapter with these weights is known by."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / WEIGHTS_FILE
        path.write_bytes(weights_bytes(number))
        return digest_of(parse_spec(config_bytes()).canonical, path)


def allowed_after(before: Allowed, number: int, outcomes: Sequence[str]) -> Allowed:
    """What may be found after a life: a step that failed, or was not heard of, may have been taken or not."""
    allowed = dict(before)
    for (verb, name, offset), outcome in zip(STEPS, [*outcomes, "killed"], strict=False):
        after = digest_for(number + offset) if verb == "put" else None
        allowed[name] = {after} if outcome.endswith("ok") else {after} | allowed.get(name, {None})
    return allowed


def check_recovered(data_dir: Path, allowed: Allowed) -> Allowed:
    """Open the store as the next start would: all that it lists is allowed and whole, and nothing else lies there.

    So it is in a copy that has lost its catalogue. Then deletes and an upload must work, which leave what is
    to be replaced in the next life.
    """
    with TemporaryDirectory() as folder, closing(Store(without_catalogue(data_dir, Path(folder) / "copy"))) as rebuilt:
        check_allowed(rebuilt, allowed)
    with opened(data_dir) as (store, registry):
        assert store.quarantined == []
        assert list((data_dir / "staging").iterdir()) == []
        records = [record for name in store.names() for record in store.versions(name)]
        assert {folder.name for folder in (data_dir / "blobs").iterdir()} == {hex_of(r.digest) for r in records}
        for record in records:
            store.verify(record.digest)
        store.check_integrity()
        for name in check_allowed(store, allowed):
            registry.delete(name).freed.result(_HANG_SECONDS)
        put(registry, "replaced", -1)
        registry.check_integrity()
    return {"replaced": {digest_for(-1)}}


def check_allowed(store: Store, allowed: Allowed) -> list[str]:
    """Every name stands for what it may; which there are."""
    current = {name: store.current(name).digest for name in store.names()}
    for name in current.keys() | allowed.keys():
        assert current.get(name) in allowed.get(name, {None}), name
    assert store.quarantined == []
    return list(current)


def everything(store: Store) -> dict[str, Any]:
    """All that a store answers."""
    names = {name: (store.current(name), store.versions(name), store.is_pinned(name)) for name in store.names()}
    shared_with = {name: store.shared_with(name) for name in names}
    told = {"names": names, "shared_with": shared_with, "gates": {name: store.gate(name) for name in names}}
    return {**told, "origins": store.origins(), "aliases": store.aliases()}


def without_catalogue(data_dir: Path, copy: Path) -> Path:
    """A copy of a data directory, as it lies there, without the catalogue and its log."""
    shutil.copytree(data_dir, copy, ignore=shutil.ignore_patterns("catalogue.sqlite3*"))
    return copy


class Nursery:
    """A process that has imported everything once, and forks for each life."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._commands = process.stdin
        self._answers = process.stdout

    def live(self, data_dir: Path, number: int, hurt: Hurt, mode: Mode = "plain", keep_versions: int = 1) -> Life:
        """One life in `data_dir`, with weights that belong to its number."""
        self._say([str(data_dir), number, hurt.thread, mode, keep_versions])
        with strace(int(self._next()), hurt.syscall, hurt.effect, hurt.when) as report:
            self._say("go")
            *outcomes, end = iter(self._next, "")
            is_hurt = int(end) == -signal.SIGKILL or "(INJECTED)" in report.read()
        return Life(outcomes, int(end), is_hurt)

    def _say(self, command: object) -> None:
        self._commands.write(json.dumps(command) + "\n")
        self._commands.flush()

    def _next(self) -> str:
        line = self._answers.readline()
        assert line, "the nursery ended"
        return line.rstrip("\n")


@contextmanager
def nursery() -> Iterator[Nursery]:
    """A nursery, ended with the block."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    with process:
        try:
            yield Nursery(process)
        finally:
            process.kill()


@contextmanager
def strace(thread_id: int, syscall: str, effect: str, when: str, *flags: str) -> Iterator[IO[str]]:
    """What a `Hurt` says done to one thread, or with -f to its whole process, while the block runs; strace's report."""
    inject = f"inject=?{syscall}:{effect}:when={when}"  # ?: unknown to some machines
    command = ["strace", *flags, "-p", str(thread_id), "-e", f"trace=?{syscall}", "-e", inject]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "attached" in line, line
        try:
            yield process.stderr
        finally:
            process.terminate()


def main() -> None:
    """For each command from stdin, fork, and tell how the child ended: its lines, its exit code, an empty line."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:  # what is imported late is imported now
        _live(folder, 0, "main", "plain", 1, ready=lambda _thread_id: None, tell=lambda _line: None)
    gc.freeze()  # no child looks through what it has from here, which would copy it
    while command := os.read(0, 4096):
        if (child := os.fork()) == 0:
            _live(*json.loads(command), ready=_wait_for_strace, tell=_tell)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        _tell(str(os.waitstatus_to_exitcode(status)))
        _tell("")


def _live(
    data_dir: str,
    number: int,
    thread: Thread,
    mode: Mode,
    keep_versions: int,
    *,
    ready: Callable[[int], None],
    tell: Callable[[str], None],
) -> None:
    if thread == "start":
        ready(threading.get_native_id())
    with opened(Path(data_dir), keep_versions) as (store, registry):
        registry.check_integrity()  # which starts the cleaner
        if thread != "start":
            ready(threading.get_native_id() if thread == "main" else _cleaners_id())
        for step in STEPS:
            outcome = _try(registry, number, *step)
            store.check_integrity()
            if outcome != "ok" and mode == "retry":
                outcome += " " + _try(registry, number, *step)
            tell(outcome)
        if mode == "abandon":
            os._exit(0)
        registry.check_integrity()


def _try(registry: Registry, number: int, verb: str, name: str, offset: float) -> str:
    """Take one step; "ok", or the error's code, after which everything must be as it was."""
    before = [card.record for card in registry.cards()]
    try:
        if verb == "put":
            put(registry, name, number + offset)
        else:
            registry.delete(name).freed.result(_HANG_SECONDS)
    except AdapterError as error:
        assert [card.record for card in registry.cards()] == before
        return error.code
    return "ok"


def _cleaners_id() -> int:
    [native_id] = [thread.native_id for thread in threading.enumerate() if thread.name.startswith("adapter-free")]
    assert native_id is not None
    return native_id


def _wait_for_strace(thread_id: int) -> None:
    _tell(str(thread_id))
    os.read(0, 4096)


def _tell(line: str) -> None:
    os.writev(1, [line.encode(), b"\n"])  # a call that the store has no use for, so that this is never hurt


if __name__ == "__main__":
    main()
