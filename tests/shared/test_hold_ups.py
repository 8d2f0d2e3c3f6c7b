"""What waits for the shared store, or for a disk, holds up nothing else; what is checked holds at the end."""

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from replicas import Disturbed, facts, put, replicas, see, unreachable
from swaplora_adapters.errors import (
    AdapterNotFoundError,
    InvalidAdapterNameError,
    PreconditionFailedError,
    StorageFullError,
    StoreUnreachableError,
    VersionMismatchError,
)
from swaplora_adapters.files.naming import stored_name
from swaplora_adapters.registry import changes as registry_changes
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.store.conditions import Conditions
from swaplora_adapters.store.records import Target
from swaplora_adapters.store.shared import extras
from swaplora_adapters.store.shared.address import open_objects
from swaplora_adapters.store.shared.objects import Listed, Objects
from swaplora_server.evaluation.gate import Gate, GateTask
from swaplora_server.evaluation.task import parse_task
from swaplora_server.http.routes import control
from swaplora_server.service.errors import RequestError
from swaplora_server.service.gates import gates
from swaplora_server.service.gates.gates import Gates
from swaplora_server.service.gates.task_files import TaskFiles

LOG = "/log/"
HANG_SECONDS = 60  # unless the test comes to its end


@pytest.fixture
def disturbed(tmp_path: Path) -> list[Disturbed]:
    return [Disturbed(open_objects(str(tmp_path / "shared"))) for _ in range(2)]


@contextmanager
def hanging(of: Disturbed, call: str) -> Iterator[threading.Event]:
    """Each such call hangs while the body runs; the event says that one does."""
    is_over, has_begun = threading.Event(), threading.Event()

    def hang(each: str, _key: str) -> None:
        if each == call:
            has_begun.set()
            is_over.wait(HANG_SECONDS)

    of.before = hang
    try:
        yield has_begun
    finally:
        is_over.set()
        of.come_back()


def load(of: Registry, name: str, seconds: float) -> None:
    leases = of.lease_weights([of.lease(name)])
    try:
        leases.weights.result(seconds)
    finally:
        leases.release()


def until(of: Registry, *, is_stuck: bool) -> None:
    while of.names.changes.is_stuck != is_stuck:
        time.sleep(0.05)


def test_nothing_is_held_while_files_are_sent_that_were_there_when_the_upload_came(
    files: list[Path], tmp_path: Path, disturbed: list[Disturbed], monkeypatch: pytest.MonkeyPatch
) -> None:
    with replicas(tmp_path, disturbed) as (one, other):
        digest = put(one, "sql", files[0]).record.digest
        put(one, "tales", files[1])
        see(other)
        one.delete("sql").freed.result(HANG_SECONDS)
        see(other)
        monkeypatch.setattr(other.names.index, "digests", lambda: frozenset({digest}))  # as it was
        upload = threading.Thread(target=put, args=(other, "sql", files[0]))
        with hanging(disturbed[1], "put") as has_begun:
            upload.start()
            assert has_begun.wait(HANG_SECONDS)
            version = put(one, "tales", files[2]).record.version
            other.seen().result(HANG_SECONDS / 2)
            assert other.card("tales").record.version == version
            assert "sql" not in other.names.index
        upload.join()
        see(one)
        load(one, "sql", HANG_SECONDS)
        assert one.card("sql").record.digest == digest


def test_what_is_here_is_loaded_while_another_is_fetched_and_nothing_is_fetched_of_a_store_that_is_away(
    files: list[Path], tmp_path: Path, disturbed: list[Disturbed]
) -> None:
    with replicas(tmp_path, disturbed) as (one, other):
        for number, name in enumerate(("cold", "colder")):
            put(one, name, files[number])
        see(other)
        put(other, "here", files[2])
        with hanging(disturbed[1], "fetch") as has_begun:
            cold = other.lease_weights([other.lease("cold")])
            assert has_begun.wait(HANG_SECONDS)
            load(other, "here", HANG_SECONDS / 2)
            assert not cold.weights.done()
        cold.weights.result(HANG_SECONDS)
        cold.release()
        calls: list[str] = []

        def vanish(call: str, _key: str) -> None:
            calls.append(call)
            raise unreachable()

        disturbed[1].before = vanish
        while other.names.changes.failure is None:
            time.sleep(0.05)
        with pytest.raises(StoreUnreachableError):
            load(other, "colder", HANG_SECONDS)
        assert "fetch" not in calls
        disturbed[1].come_back()


def test_a_server_whose_disk_is_full_says_so_and_catches_up_when_it_has_room(
    files: list[Path], tmp_path: Path, disturbed: list[Disturbed], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object) -> None:
        raise StorageFullError("the disk is full (for a test)")

    with replicas(tmp_path, disturbed) as (one, other):
        put(one, "sql", files[0])
        see(other)
        with monkeypatch.context() as patch:
            patch.setattr(other._store._names, "put", full)  # noqa: SLF001
            put(one, "sql", files[1])
            until(other, is_stuck=True)
            with pytest.raises(StorageFullError):
                put(other, "tales", files[2])
            with pytest.raises(StorageFullError):
                other.seen().result(0)
        until(other, is_stuck=False)
        see(other)
        assert other.card("sql").record.version == 2
        put(other, "tales", files[2])


def test_an_alias_that_another_server_points_elsewhere_meanwhile_is_not_deleted_with_its_adapter(
    files: list[Path], tmp_path: Path, disturbed: list[Disturbed]
) -> None:
    name, stored = "org/model", stored_name("org/model")
    with replicas(tmp_path, disturbed) as (one, other):
        put(one, stored, files[0])
        put(one, "sql", files[1])
        one.put_alias(name, [Target(stored, 1)])
        outrun: list[str] = []

        def be_faster(call: str, key: str) -> None:
            if call == "create" and LOG in key and not outrun:
                outrun.append(key)
                other.put_alias(name, [Target("sql", 1)])

        disturbed[0].before = be_faster
        with pytest.raises(AdapterNotFoundError):
            control._delete(one, name)  # noqa: SLF001
        assert len(outrun) == 1
        assert one.names.index.alias(name).targets == (Target("sql", 1),)
        assert stored in one.names.index
        one.put_alias(name, [Target(stored, 1)])

        made: list[str] = []

        def vanish_then(call: str, key: str) -> None:
            made.extend([key] if call == "create" else [])
            if made and call == "get" and LOG in key:  # by which it is known to be made
                disturbed[0].vanish()

        disturbed[0].after, disturbed[0].before = vanish_then, lambda _call, _key: None
        with pytest.raises(StoreUnreachableError, match=f"delete {stored}"):
            control._delete(one, name)  # noqa: SLF001
        disturbed[0].come_back()


def test_gates_are_counted_anew_where_another_server_has_set_one_meanwhile(
    files: list[Path], tmp_path: Path, disturbed: list[Disturbed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "MAX_GATES", 1)
    gate = Gate(task=GateTask(digest=f"sha256:{'0' * 64}", num_items=1), min_score=0.5, max_tokens=1, stop=[])
    with replicas(tmp_path, disturbed) as (one, other):
        put(one, "sql", files[0])
        put(one, "tales", files[1])
        outrun: list[str] = []

        def be_faster(call: str, key: str) -> None:
            if call == "create" and LOG in key and not outrun:
                outrun.append(key)
                see(other)
                other.set_gate("tales", gate.model_dump_json())

        disturbed[0].before = be_faster
        (tmp_path / "gates").mkdir()
        with pytest.raises(RequestError, match="1 adapters have a gate"):
            asyncio.run(Gates(TaskFiles(tmp_path / "gates"), one).put(one, "sql", gate, []))
        assert len(outrun) == 1
        assert [named.current.name for named in one.names.index.gated()] == ["tales"]


def test_what_one_server_has_claimed_is_its_own_after_its_restart_and_another_s_only_once_it_is_gone(
    tmp_path: Path, disturbed: list[Disturbed], monkeypatch: pytest.MonkeyPatch
) -> None:
    with replicas(tmp_path, disturbed) as (one, other):
        assert one.extras is not None
        assert other.extras is not None
        assert one.extras.claim("x")
        assert not other.extras.claim("x")
    with replicas(tmp_path, disturbed) as (one, other):
        assert one.extras is not None
        assert other.extras is not None
        assert not other.extras.claim("x")
        assert one.extras.claim("x")
        monkeypatch.setattr(extras, "CLAIM_SECONDS", -1.0)  # as if it had not claimed it anew
        taken = disturbed[1].under

        def claimed_meanwhile(prefix: str) -> list[Listed]:
            found = taken(prefix)
            assert one.extras is not None
            assert one.extras.claim("x")
            return found

        monkeypatch.setattr(disturbed[1], "under", claimed_meanwhile)
        assert not other.extras.claim("x")
        monkeypatch.setattr(disturbed[1], "under", taken)
        assert other.extras.claim("x")
        other.extras.let_go("x")
        assert not [each for each in disturbed[0].under("") if "/claims/" in each.key]


def test_a_change_that_hangs_once_it_is_made_has_all_others_refused(
    files: list[Path], tmp_path: Path, disturbed: list[Disturbed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look has read it, and waits for who makes it."""
    monkeypatch.setattr(registry_changes, "HANGING_SECONDS", 0.3)
    monkeypatch.setattr(registry_changes, "HOLD_SECONDS", 0.1)
    is_over, has_begun = threading.Event(), threading.Event()

    def hang(call: str, key: str) -> None:
        if call == "create" and LOG in key:
            has_begun.set()
            is_over.wait(HANG_SECONDS)

    with replicas(tmp_path, disturbed[:1]) as (one,):
        put(one, "sql", files[0])
        disturbed[0].after = hang
        change = threading.Thread(target=one.put_alias, args=("best", [Target("sql", 1)]))
        change.start()
        try:
            assert has_begun.wait(HANG_SECONDS)
            with pytest.raises(StoreUnreachableError):
                one.put_alias("other", [Target("sql", 1)])
            with pytest.raises(StoreUnreachableError):
                put(one, "tales", files[1])
            with pytest.raises(StoreUnreachableError):
                one.seen().result(0)
            assert not is_over.is_set()
        finally:
            is_over.set()
            change.join()


def test_a_look_does_not_wait_for_a_change_that_has_found_the_same(
    files: list[Path], tmp_path: Path, disturbed: list[Disturbed]
) -> None:
    with replicas(tmp_path, disturbed) as (one, other):
        put(one, "sql", files[0])

        def job() -> None:
            assert "sql" in other.names.index
            other.seen().result(HANG_SECONDS)

        with other.names.changes:
            put(one, "tales", files[1])
            seen = other.seen()
            other.names.changes.make(job)
            seen.result(HANG_SECONDS)
        assert facts(one) == facts(other)


def test_an_upload_that_is_refused_leaves_nothing_in_the_store(
    files: list[Path], tmp_path: Path, disturbed: list[Disturbed]
) -> None:
    def blobs() -> int:
        return len([each for each in disturbed[0].under("") if "/blobs/" in each.key])

    with replicas(tmp_path, disturbed) as (one, other):
        digest = put(one, "sql", files[0]).record.digest
        one.put_alias("best", [Target("sql", 1)])
        put(one, "sql", files[1])
        before = blobs()
        with pytest.raises(VersionMismatchError):  # before any look: of what all others have changed
            put(other, "sql", files[2], conditions=Conditions(if_match=digest))
        with pytest.raises(PreconditionFailedError):
            put(other, "sql", files[2], conditions=Conditions(if_none_match=True))
        with pytest.raises(InvalidAdapterNameError):
            put(other, "best", files[2])
        assert blobs() == before


def tasks_of(objects: Objects) -> list[str]:
    return [each.key for each in objects.under("") if "/tasks/" in each.key]


TASK = parse_task('{"prompt": "a", "answer": "b"}\n')
GATE = Gate(task=GateTask(digest=TASK.digest, num_items=1), min_score=0.5, max_tokens=1, stop=[])


@pytest.fixture
def gated(
    files: list[Path], tmp_path: Path, disturbed: list[Disturbed]
) -> Iterator[tuple[list[Registry], list[Gates]]]:
    """Two servers with adapters `sql` and `tales`."""
    with replicas(tmp_path, disturbed) as both:
        for number, name in enumerate(("sql", "tales")):
            put(both[0], name, files[number])
        see(both[1])
        yield both, [Gates(TaskFiles(tmp_path / f"gates{n}", of.extras), of) for n, of in enumerate(both)]


def is_had_by_a_new_server(folder: Path, of: Registry) -> bool:
    tasks = TaskFiles(folder / secrets.token_hex(4), of.extras)
    tasks.bring(TASK.digest)
    return tasks.read(TASK.digest).digest == TASK.digest


def test_tasks_of_a_gate_that_is_refused_are_not_shared(
    gated: tuple[list[Registry], list[Gates]], disturbed: list[Disturbed], monkeypatch: pytest.MonkeyPatch
) -> None:
    (one, _), (of, _) = gated
    monkeypatch.setattr(gates, "MAX_TENANT_BYTES", 1)
    with pytest.raises(RequestError, match="may have 1"):
        asyncio.run(of.put(one, "sql", GATE, [TASK]))
    assert not tasks_of(disturbed[0])


def test_tasks_of_gates_that_were_there_before_the_store_are_shared_at_the_next_start(
    gated: tuple[list[Registry], list[Gates]], disturbed: list[Disturbed], tmp_path: Path
) -> None:
    (one, other), (of, _) = gated
    asyncio.run(of.put(one, "sql", GATE, [TASK]))
    [key] = tasks_of(disturbed[0])
    disturbed[0].remove(key)
    [file] = (tmp_path / "gates0").iterdir()
    content = file.read_bytes()
    file.unlink()
    for here in (None, b"", content):
        if here is not None:
            file.write_bytes(here)
        Gates(TaskFiles(tmp_path / "gates0", one.extras), one)
        assert bool(tasks_of(disturbed[0])) == (here == content)
    assert is_had_by_a_new_server(tmp_path, other)
    Gates(TaskFiles(tmp_path / "gates0", one.extras), one)
    assert len(tasks_of(disturbed[0])) == 1


def test_tasks_that_no_gate_names_any_more_are_removed_with_the_last_that_did(
    gated: tuple[list[Registry], list[Gates]],
    disturbed: list[Disturbed],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where that went with its adapter, or the store was away then, or an earlier release has put it."""
    (one, other), (of_one, of_other) = gated
    asyncio.run(of_one.put(one, "sql", GATE, [TASK]))
    see(other)
    asyncio.run(of_other.put(other, "tales", GATE, [TASK]))
    assert len(tasks_of(disturbed[0])) == 1
    see(one)
    asyncio.run(of_one.remove(one, "sql"))
    assert is_had_by_a_new_server(tmp_path, one)
    other.delete("tales")
    asyncio.run(of_other.sweep())
    assert not tasks_of(disturbed[0])
    see(one)
    asyncio.run(of_one.put(one, "sql", GATE, [TASK]))
    [key] = tasks_of(disturbed[0])
    disturbed[0].remove(key)
    asyncio.run(of_one.put(one, "sql", GATE, [TASK]))  # which mends it
    disturbed[0].before = lambda call, key: lose(call == "remove" and "/tasks/" in key)
    asyncio.run(of_one.remove(one, "sql"))
    disturbed[0].come_back()
    [key] = tasks_of(disturbed[0])
    asyncio.run(of_one.sweep())
    assert not tasks_of(disturbed[0])
    earlier = key.rpartition("/")[0] + ".jsonl"
    disturbed[0].create(earlier, b"".join(f"{item.canonical}\n".encode() for item in TASK.items))
    assert is_had_by_a_new_server(tmp_path, one)
    assert one.extras is not None
    one.extras.sweep_tasks((), one.revision)
    assert tasks_of(disturbed[0]) == [earlier]
    monkeypatch.setattr(extras, "_EARLIER_SECONDS", -1.0)
    one.extras.sweep_tasks((), one.revision)
    assert not tasks_of(disturbed[0])


def lose(is_lost: bool) -> None:
    if is_lost:
        raise unreachable()


@pytest.mark.parametrize("moment", ["swept", "outrun", "put"])
def test_a_task_that_is_named_again_meanwhile_is_not_swept(
    gated: tuple[list[Registry], list[Gates]], disturbed: list[Disturbed], tmp_path: Path, moment: str
) -> None:
    """One server lets go of the last gate as the other sets one of the same task, between any two steps of it.

    The other does all of it between the listing of what is swept and its end; or the one as the other has found that
    the task is named; or it sweeps as the other has put the task and not named it yet.
    """
    (one, other), (of_one, of_other) = gated
    asyncio.run(of_one.put(one, "sql", GATE, [TASK]))
    see(other)
    if moment == "put":
        asyncio.run(of_one.remove(one, "sql"))
    steps: dict[str, tuple[str, Callable[[], object]]] = {
        "swept": ("remove", lambda: asyncio.run(of_other.put(other, "tales", GATE, [TASK]))),
        "outrun": ("create", lambda: asyncio.run(of_one.remove(one, "sql"))),
        "put": ("create", of_one._sweep),  # noqa: SLF001
    }
    at, step = steps[moment]
    done: list[str] = []

    def meanwhile(call: str, key: str) -> None:
        if call == at and not done and (LOG in key or at == "remove"):
            done.append(key)
            thread = threading.Thread(target=step)
            thread.start()
            thread.join()

    disturbed[moment != "swept"].before = meanwhile
    if moment == "swept":
        asyncio.run(of_one.remove(one, "sql"))
    else:
        asyncio.run(of_other.put(other, "tales", GATE, [TASK]))
    assert len(done) == 1
    assert [each.current.name for each in other.names.index.gated()] == ["tales"]
    assert is_had_by_a_new_server(tmp_path, other)
    assert len(tasks_of(disturbed[0])) == 1
