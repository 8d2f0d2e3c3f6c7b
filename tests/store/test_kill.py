"""SIGKILL at every system call of an adapter's life, and of the server at any time: what was acknowledged is whole."""

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import httpx
import pytest

import crash
from crash import Allowed, Hurt, Nursery, Thread
from server_process import SMALL, forked
from serving import Running
from soak import size
from swaplora_adapters.config.parse import parse_spec
from swaplora_adapters.files.digest import digest_of
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE

PROMPT = list(range(50, 70))
NUM_KILLS = size(ci=5, soak=25)
NUM_THREADS = 4


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    if reason := crash.why_not():
        pytest.skip(reason)
    with crash.nursery() as started:
        yield started


@pytest.mark.parametrize("thread", ["start", "cleaner"])
def test_sigkill_at_each_system_call_leaves_what_was_acknowledged_and_nothing_partial(
    nursery: Nursery, tmp_path: Path, thread: Thread
) -> None:
    found: Allowed = {}
    numbers = count(1)
    kills: Counter[str] = Counter()
    for syscall in (*crash.SYSCALLS, "close"):
        while True:
            number = next(numbers)
            life = nursery.live(tmp_path, number, Hurt(thread, syscall, "signal=KILL", str(kills[syscall] + 1)))
            found = crash.check_recovered(tmp_path, crash.allowed_after(found, number, life.outcomes))
            if not life.is_hurt:
                break
            kills[syscall] += 1
        assert life.outcomes == ["ok"] * len(crash.STEPS)
    crash.report(f"{kills.total()} kills of the {thread} thread: {dict(kills)}")
    assert kills["openat"]
    assert kills["rename"]


def test_sigkill_while_a_lost_catalogue_is_made_anew_loses_nothing(nursery: Nursery, tmp_path: Path) -> None:
    found = crash.check_recovered(tmp_path, {})
    kills: Counter[str] = Counter()
    for syscall, number in zip(crash.SYSCALLS, count(1000, 1000), strict=False):
        for when in count(1):
            os.truncate(tmp_path / "catalogue.sqlite3", 0)
            life = nursery.live(tmp_path, number + when, Hurt("start", syscall, "signal=KILL", str(when)))
            found = crash.check_recovered(tmp_path, crash.allowed_after(found, number + when, life.outcomes))
            if life.outcomes:
                break  # it has begun to serve, and what follows is the test before this one
            kills[syscall] += 1
    crash.report(f"{kills.total()} kills while starting without a catalogue: {dict(kills)}")
    assert kills["rename"]


class Client(threading.Thread):
    """Puts and deletes at random, under names of its own, until the server is gone."""

    def __init__(self, number: int, url: str, folders: list[Path], seed: int) -> None:
        super().__init__()
        self._url = url
        self._names = (f"client{number}a", f"client{number}b")
        self._folders = folders
        self._random = random.Random(seed)
        self.acknowledged: dict[str, Path | None] = {}  # None: deleted
        self.pending: tuple[str, Path | None] | None = None
        self.num_acknowledged = 0

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            running = Running(self._url, None, client)  # type: ignore[arg-type]  # another process's
            while self._act(running):
                self.num_acknowledged += 1

    def _act(self, running: Running) -> bool:
        """One operation; whether it was answered."""
        name, folder = self._random.choice(self._names), self._random.choice([*self._folders, None])
        self.pending = (name, folder)
        try:
            answer = running.client.delete(f"/v1/adapters/{name}") if folder is None else running.put(name, folder)
        except httpx.TransportError:
            return False
        assert answer.status_code in ((200, 404) if folder is None else (200, 201)), answer.text
        self.acknowledged[name] = folder
        self.pending = None
        return True


def answers_by_digest(running: Running, folders: list[Path]) -> dict[str, list[int]]:
    """What every adapter says undisturbed; nothing of them stays."""
    answers = {}
    for folder in folders:
        card = running.put("control", folder).json()
        answers[card["digest"]] = running.token_ids("control", PROMPT)
    assert running.client.delete("/v1/adapters/control").status_code == 200
    assert len(set(map(tuple, answers.values()))) == len(folders)
    return answers


def check_listed(running: Running, allowed: Allowed, answers: dict[str, list[int]]) -> dict[str, str]:
    """Every name stands for what it may, and says what that says; the digests by name."""
    listed = {card["name"]: card["digest"] for card in running.client.get("/v1/adapters").json()["data"]}
    for name in allowed.keys() | listed.keys():
        assert listed.get(name) in allowed.get(name, {None}), name
    for name, digest in listed.items():
        assert running.token_ids(name, PROMPT) == answers[digest]
    return listed


def allowed_after(listed: dict[str, str], clients: list[Client]) -> Allowed:
    """What was acknowledged holds, what was cut off may have been done or not, the rest is as it was listed."""
    allowed: dict[str, set[str | None]] = {name: {digest} for name, digest in listed.items()}
    for client in clients:
        for name, folder in client.acknowledged.items():
            allowed[name] = {digest_in(folder)}
        if client.pending is not None:
            name, folder = client.pending
            allowed[name] = {digest_in(folder), *allowed.get(name, {None})}
    return allowed


def digest_in(folder: Path | None) -> str | None:
    """What an upload of this folder is known by; None for a delete."""
    return (
        None
        if folder is None
        else digest_of(parse_spec((folder / CONFIG_FILE).read_bytes()).canonical, folder / WEIGHTS_FILE)
    )


def disturbed(pid: int, url: str, folders: list[Path], seed: int) -> list[Client]:
    """Clients at work until the server is killed, at a time that the seed decides."""
    clients = [Client(number, url, folders, 1000 * seed + number) for number in range(NUM_THREADS)]
    for client in clients:
        client.start()
    time.sleep(random.Random(seed).uniform(0.05, 1.5))
    os.kill(pid, signal.SIGKILL)
    for client in clients:
        client.join()
    return clients


def test_sigkill_of_the_server_at_any_time_loses_nothing_acknowledged(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    answers: dict[str, list[int]] = {}
    allowed: Allowed = {}
    num_acknowledged = num_cut_off = 0
    for kill in range(NUM_KILLS + 1):
        with forked(base, tmp_path, *SMALL) as (server, client):
            running = Running(str(client.base_url), None, client)  # type: ignore[arg-type]  # another process's
            answers = answers or answers_by_digest(running, adapters)
            listed = check_listed(running, allowed, answers)
            if kill < NUM_KILLS:
                clients = disturbed(server.pid, running.url, adapters, seed=kill)
                allowed = allowed_after(listed, clients)
                num_acknowledged += sum(client.num_acknowledged for client in clients)
                num_cut_off += sum(client.pending is not None for client in clients)
    crash.report(f"{NUM_KILLS} kills, {num_acknowledged} operations acknowledged, {num_cut_off} cut off")
    assert num_acknowledged
