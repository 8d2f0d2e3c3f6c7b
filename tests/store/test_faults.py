"""A disk that is full or fails, at every system call and over HTTP; files that change under a live adapter."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

import crash
from crash import Allowed, Hurt, Nursery, Thread
from repository import ROOT
from server_process import SMALL, forked, free_port, wait_ready
from serving import Running, serving, settings
from soak import size
from swaplora_adapters.files.digest import hex_of
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE

CODES = ("storage_full", "storage_failed")
SQLITE_FAULTS = [("pwrite64", "ENOSPC", CODES[0]), ("pwrite64", "EIO", CODES[1]), ("fdatasync", "EIO", CODES[1])]
FEW_SYSCALLS = [syscall for syscall in crash.SYSCALLS if syscall not in ("openat", "pwrite64")]
IS_SOAK = bool(size(ci=0, soak=1))
PROMPT = list(range(80, 100))
NUMBERED = [f"n{number}" for number in range(30)]
ROOM_FOR_ONE = 32 << 10  # for either of two adapters that have 26 and 29 KiB


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    if reason := crash.why_not():
        pytest.skip(reason)
    with crash.nursery() as started:
        yield started


def sweep(nursery: Nursery, data_dir: Path, thread: Thread, error: str, *, lasts: bool) -> Counter[str]:
    """A life for each call: it fails alone, and the step is tried again; or, where it lasts, so do all that follow.

    But in `make soak`, those of `FEW_SYSCALLS` alone where they last, or where the main thread's are short of room.
    """
    is_whole = IS_SOAK or (not lasts and (thread, error) != ("main", "ENOSPC"))
    found: Allowed = {}
    numbers = count(1)
    faults: Counter[str] = Counter()
    retried = {f"{code} ok" for code in CODES}
    failed = {*CODES, "adapter_not_found"}  # the last where the put before the delete failed
    for syscall in crash.SYSCALLS if is_whole else FEW_SYSCALLS:
        while True:
            number = next(numbers)
            hurt = Hurt(thread, syscall, f"error={error}", f"{faults[syscall] + 1}{'+' if lasts else ''}")
            life = nursery.live(data_dir, number, hurt, "abandon" if lasts else "retry", keep_versions=1)
            assert life.exit_code == 0, hurt
            assert set(life.outcomes) <= {"ok", *(failed if lasts else retried)}, hurt
            found = crash.check_recovered(data_dir, crash.allowed_after(found, number, life.outcomes))
            if not life.is_hurt:
                break
            faults[syscall] += 1
    return faults


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("thread", ["main", "cleaner"])
def test_one_failing_call_fails_one_step_cleanly_and_the_step_works_when_tried_again(
    nursery: Nursery, tmp_path: Path, thread: Thread, error: str
) -> None:
    faults = sweep(nursery, tmp_path, thread, error, lasts=False)
    crash.report(f"{faults.total()} times {error} for the {thread} thread: {dict(faults)}")
    assert faults["rename"]


@pytest.mark.parametrize("error", ["EIO", *(["ENOSPC"] if IS_SOAK else [])])
def test_a_disk_that_fails_from_some_call_on_costs_nothing_that_was_acknowledged(
    nursery: Nursery, tmp_path: Path, error: str
) -> None:
    faults = sweep(nursery, tmp_path, "main", error, lasts=True)
    crash.report(f"{faults.total()} times {error} from a call on: {dict(faults)}")
    assert faults["fdatasync"]


def fail_below(folder: Path, patch: pytest.MonkeyPatch, call: str, error: int) -> None:
    """Let a function of `os` fail for what it would change in `folder`, and there alone."""
    real = getattr(os, call)

    def fake(target: Any, *args: Any, **kwargs: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
        is_change = call != "open" or args[0] & os.O_CREAT
        if path.startswith(str(folder)) and is_change:
            raise OSError(error, os.strerror(error), path)
        return real(target, *args, **kwargs)

    patch.setattr(os, call, fake)


def cards(running: Running) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = running.client.get("/v1/adapters").json()["data"]
    return [card | {"last_used": None, "last_failure": None} for card in listed]


def check_refused(answer: httpx.Response, code: str, data_dir: Path) -> None:
    """A clean refusal: the status, the code, and nothing of the server's insides."""
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, code), answer.text
    assert data_dir.name not in answer.text


@pytest.mark.parametrize("call", ["mkdir", "open", "write", "fsync", "rename"])
@pytest.mark.parametrize(("error", "code"), [(errno.ENOSPC, CODES[0]), (errno.EDQUOT, CODES[0]), (errno.EIO, CODES[1])])
def test_a_fault_is_answered_507_and_nothing_else_changes(
    server: Running, adapters: list[Path], monkeypatch: pytest.MonkeyPatch, call: str, error: int, code: str
) -> None:
    data_dir = server.service.settings.data_dir
    for name, folder in [("kept", adapters[0]), ("doomed", adapters[2])]:
        assert server.put(name, folder).status_code in (200, 201)
    expected, before = server.token_ids("kept", PROMPT), cards(server)
    with monkeypatch.context() as patch:
        fail_below(data_dir, patch, call, error)
        for name in ("kept", "new"):
            check_refused(server.put(name, adapters[1]), code, data_dir)
        assert cards(server) == before
        assert server.token_ids("kept", PROMPT) == expected
        assert server.client.delete("/v1/adapters/doomed").status_code == 200
    assert list((data_dir / "staging").iterdir()) == []
    for name in ("kept", "new"):
        assert server.put(name, adapters[1]).status_code in (200, 201)
        assert server.client.delete(f"/v1/adapters/{name}").json()["state"] == "deleted"


def test_a_catalogue_that_cannot_be_written_is_507_for_every_change_and_serving_goes_on(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    if reason := crash.why_not():
        pytest.skip(reason)
    with forked(base, tmp_path, *SMALL) as (server, client):
        running = Running(str(client.base_url), None, client)  # type: ignore[arg-type]  # another process's
        assert running.put("kept", adapters[0]).status_code == 201
        expected, before = running.token_ids("kept", PROMPT), cards(running)
        for syscall, error, code in SQLITE_FAULTS:
            with crash.strace(server.pid, syscall, f"error={error}", "1+", "-f", "-o", os.devnull):
                for name in ("kept", "new"):
                    check_refused(running.put(name, adapters[1]), code, tmp_path)
                check_refused(client.delete("/v1/adapters/kept"), code, tmp_path)
                assert running.token_ids("kept", PROMPT) == expected
            assert cards(running) == before
            assert running.put("new", adapters[1]).status_code == 201
            assert client.delete("/v1/adapters/new").json()["state"] == "deleted"


@contextmanager
def small_disk(base: Path, data_dir: Path) -> Iterator[tuple[Running, Path]]:
    """A server whose data directory is a file system of 8 MiB, and the way to it from here."""
    data_dir.mkdir()
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=8m disk "$0" && exec "$@"', str(data_dir)]
    command = [*mount, sys.executable, "-m", "swaplora_server", "serve", str(base)]
    command += ["--data-dir", str(data_dir), "--cache-dir", str(ROOT / ".cache"), *SMALL]
    with (
        free_port() as port,
        subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL) as server,
    ):
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                wait_ready(server, client)
                running = Running(str(client.base_url), None, client)  # type: ignore[arg-type]  # another process's
                yield running, Path(f"/proc/{server.pid}/root{data_dir}")
        finally:
            server.kill()


def leave_free(disk: Path, num_bytes: int) -> None:
    """Fill the disk up to so many bytes."""
    filler = disk / "filler"
    filler.touch()
    status = os.statvfs(disk)
    free = status.f_bavail * status.f_frsize + filler.stat().st_size
    filler.unlink()
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - num_bytes)


def why_no_mount() -> str | None:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "disk", "/mnt"]
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"mounting is not allowed: {tried.stderr.strip()}"


def put_with_little_room(running: Running, folder: Path, disk: Path, num_bytes: int) -> int:
    """The answer's status where so many bytes are free; either way all other adapters are as before."""
    before = cards(running)
    leave_free(disk, num_bytes)
    answer = running.put("new", folder)
    if answer.status_code == 201:
        (disk / "filler").unlink()
        assert running.client.delete("/v1/adapters/new").json()["state"] == "deleted"
    else:
        check_refused(answer, "storage_full", disk)
        check_refused(running.put("kept", folder), "storage_full", disk)
    assert cards(running) == before
    return answer.status_code


def test_a_full_disk_is_507_while_serving_goes_on(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    if reason := why_no_mount():
        pytest.skip(reason)
    with small_disk(base, tmp_path / "data") as (running, disk):
        for name in ("kept", *NUMBERED):
            assert running.put(name, adapters[0]).status_code == 201
        expected = running.token_ids("kept", PROMPT)
        answers = Counter(put_with_little_room(running, adapters[2], disk, n << 10) for n in range(0, 160, 4))
        crash.report(f"answers with 0 to 156 KiB free: {dict(answers)}")
        assert answers.keys() == {201, 507}
        leave_free(disk, 0)
        large = {"config": b"{}", "weights": bytes(16 << 20)}
        check_refused(running.client.put("/v1/adapters/new", files=large), "storage_full", tmp_path)
        for name in NUMBERED:  # which share their files, so that no room is won
            assert running.client.delete(f"/v1/adapters/{name}").status_code == 200
        assert running.token_ids("kept", PROMPT) == expected
        (disk / "filler").unlink()
        assert running.put("new", adapters[2]).status_code == 201


def overwrite(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def swap_for_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated weights": lambda blob: os.truncate(blob / WEIGHTS_FILE, 100),
    "overwritten weights": lambda blob: overwrite(blob / WEIGHTS_FILE),
    "overwritten config": lambda blob: overwrite(blob / CONFIG_FILE),
    "unlinked weights": lambda blob: (blob / WEIGHTS_FILE).unlink(),
    "link instead of weights": lambda blob: swap_for_link(blob / WEIGHTS_FILE),
    "no folder": shutil.rmtree,
}


def check_failed(running: Running, data_dir: Path, name: str) -> None:
    """The adapter is refused with its reason, and named as failed."""
    answer = running.generate(name, PROMPT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "adapter_failed")
    assert str(data_dir) not in answer.text
    card = running.client.get(f"/v1/adapters/{name}").json()
    assert card["state"] == "failed"
    assert "its stored" in card["reason"]
    assert not (data_dir / "blobs" / hex_of(card["digest"])).exists()


def damage_while_serving(running: Running, blob: Path, damage: Callable[[Path], object]) -> None:
    """Damage the files of `a` in the middle of its answer: neither that one nor the next is any different."""
    body = {"model": "a", "prompt": PROMPT, "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}
    said = []
    for disturb in (lambda _blob: None, lambda _blob: None, damage, lambda _blob: None):
        with running.client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            events = [next(lines)]
            disturb(blob)
            events += list(lines)
        chunks = [json.loads(line.removeprefix("data: ")) for line in events if line.startswith("data: {")]
        said.append([choice["text"] for chunk in chunks for choice in chunk["choices"]])
    assert said[0] == said[1] == said[2] == said[3]
    assert len(said[0]) > 100


def check_mended(running: Running, folder: Path, expected: list[int]) -> None:
    """The same bytes again are the same version, whole."""
    answer = running.put("a", folder)
    assert (answer.status_code, answer.json()["version"], answer.json()["state"]) == (200, 1, "stored")
    assert running.token_ids("a", PROMPT) == expected


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_to_a_live_adapters_files_waits_for_its_next_load_and_an_upload_mends_it(
    base: Path, adapters: list[Path], tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    config = settings(base, tmp_path, adapter_memory_bytes=ROOM_FOR_ONE)
    with serving(config) as running:
        digest = running.put("a", adapters[3]).json()["digest"]
        running.put("b", adapters[4])
        b, a = running.token_ids("b", PROMPT), running.token_ids("a", PROMPT)
        damage_while_serving(running, tmp_path / "blobs" / hex_of(digest), damage)
        assert running.token_ids("a", PROMPT) == a
        assert running.token_ids("b", PROMPT) == b  # which evicts the other
        check_failed(running, tmp_path, "a")
        assert running.token_ids("b", PROMPT) == b
        check_mended(running, adapters[3], a)
        damage(tmp_path / "blobs" / hex_of(digest))
    with serving(config) as running:
        check_failed(running, tmp_path, "a")
        assert running.token_ids("b", PROMPT) == b
        check_mended(running, adapters[3], a)
