"""Servers that change, look, compact, sleep and are killed between any two calls: all know the log replayed."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soak import size
from swaplora_adapters.errors import StoreChangedError
from swaplora_adapters.store.shared.history import compaction, segments
from swaplora_adapters.store.shared.history.compaction import Compaction
from swaplora_adapters.store.shared.history.entry import Entry, Position
from swaplora_adapters.store.shared.history.log import Log, TrimmedError
from swaplora_adapters.store.shared.history.moment import Moment
from swaplora_adapters.store.shared.history.snapshots import Snapshots
from swaplora_adapters.store.shared.objects import Listed
from swaplora_adapters.store.shared.trying import decoded

T = TypeVar("T")
LOG = "s/log/"
NUM_SERVERS = 3
State = dict[tuple[str, str], dict[str, Any]]


class KilledError(BaseException):
    """Nothing is done any more by who was killed."""


class World:
    """A store in memory, a clock, and whose turn it is: each call waits until it is let on."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {"store.json": b'{"format": 1, "id": "s"}'}
        self.made: dict[int, Entry] = {}  # what was first made of each change, which is what all are to have
        self.now = 1e6
        self.lost: list[str] = []

    def note(self, key: str, content: bytes) -> None:
        if key.startswith(LOG):
            [told] = decoded(content, key)
            told.pop("format")
            self.made.setdefault(int(key.removeprefix(LOG)), Entry(**told))

    def replayed(self, revision: int) -> State:
        return applied({}, [self.made[each] for each in range(1, revision + 1)])


def applied(state: State, entries: list[Entry]) -> State:
    """What is kept after these changes."""
    state = dict(state)
    for entry in entries:
        if entry.kind != "none":
            state[entry.kind, entry.name] = entry.manifest.facts
        if entry.kind == "alias" and entry.facts["targets"] is None:
            del state["alias", entry.name]
    return state


class Server:
    """Keeps what a data directory keeps; all else is new after a kill. Its calls of the store are made one by one."""

    current: Any = threading.local()

    def __init__(self, world: World) -> None:
        self.world = world
        self.position, self.state = Position(0, None), State()
        self.acknowledged: list[Entry] = []
        self.num_made = 0
        self.slept = 0.0  # that its clocks know nothing of
        self.has_changed = False
        self._thread: threading.Thread | None = None
        self._turn, self._parked = threading.Semaphore(0), threading.Semaphore(0)
        self._kill = ""
        self.restart()

    def restart(self) -> None:
        self.log = Log(self, "s")
        self.snapshots = Snapshots(self, "s", self.log)
        self.compaction = Compaction(self.log, self.snapshots)

    # the store, call by call

    def get(self, key: str) -> bytes | None:
        return self._called(lambda: self.world.objects.get(key))

    def create(self, key: str, content: bytes) -> bool:
        def create() -> bool:
            if key in self.world.objects:
                return False
            self.world.objects[key] = content
            self.world.note(key, content)
            return True

        return self._called(create)

    def under(self, prefix: str) -> list[Listed]:
        return self._called(lambda: [Listed(k, 0.0) for k in sorted(self.world.objects) if k.startswith(prefix)])

    def remove(self, key: str) -> None:
        self._called(lambda: self.world.objects.pop(key, None))

    def put(self, key: str, path: Path) -> None:
        raise NotImplementedError

    def fetch(self, key: str, path: Path) -> bool:
        raise NotImplementedError

    def _called(self, call: Callable[[], T]) -> T:
        self._parked.release()
        self._turn.acquire()
        if self._kill == "before":
            raise KilledError
        done = call()
        if self._kill == "after":
            raise KilledError
        return done

    # what it does

    def look(self) -> None:
        is_all = False
        while not is_all:
            try:
                entries, is_all = self.log.after(self.position, 3)
            except TrimmedError:
                snapshot = self.snapshots.choose().newest
                assert snapshot.revision > self.position.revision
                aliases = [name for kind, name in self.state if kind == "alias"]
                entries = snapshot.since(self.position.revision, aliases)
            if entries:
                self.state, self.position = applied(self.state, entries), entries[-1].position

    def change(self) -> None:
        self.num_made += 1
        name, number = f"n{self.num_made % 3}", f"{len(self.world.objects)}-{id(self.log)}-{self.num_made}"
        is_alias = self.num_made % 2 == 0
        for _ in range(20):
            self.look()
            targets = None if ("alias", name) in self.state else [number]
            facts: dict[str, Any] = {"targets": targets} if is_alias else {"versions": [number]}
            entry = Entry(
                self.position.revision + 1, "alias" if is_alias else "name", name, facts, number, self.position.id
            )
            if self.log.append(entry):
                self.acknowledged.append(entry)
                self.state, self.position = applied(self.state, [entry]), entry.position
                return

    def compact(self) -> None:
        self.compaction.run(self.position.revision)

    # and when

    @property
    def is_busy(self) -> bool:
        return self._thread is not None

    def begin(self, job: Callable[[], None]) -> None:
        def run() -> None:
            Server.current.server = self
            try:
                job()
            except StoreChangedError:
                self.has_changed = True
            except KilledError:
                self.restart()
            except BaseException as error:  # noqa: BLE001 - the thread's boundary
                self.world.lost.append(repr(error))
            finally:
                self._thread = None
                self._parked.release()

        self._kill = ""
        self._thread = threading.Thread(target=run)
        self._thread.start()
        self._parked.acquire()

    def let_on(self, kill: str = "") -> None:
        """One call."""
        self._kill = kill
        self._turn.release()
        self._parked.acquire()

    def go_on(self, count: int) -> None:
        for _ in range(count):
            if self.is_busy:
                self.let_on()

    def end(self) -> None:
        while self.is_busy:
            self.let_on()


@contextmanager
def clocks(world: World) -> Iterator[None]:
    def now() -> float:
        return world.now - float(Server.current.server.slept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "SEGMENT", 2)
        patch.setattr(compaction, "time", SimpleNamespace(monotonic=now))
        patch.setattr(Moment, "now", classmethod(lambda cls: cls(now(), now())))
        yield


NUMBERS = st.integers(0, NUM_SERVERS - 1)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("changes"), NUMBERS, st.integers(1, 5)),
        st.tuples(st.just("cut"), NUMBERS, st.integers(0, 2**NUM_SERVERS - 1)),
        st.tuples(st.sampled_from(["change", "change", "look", "compact"]), NUMBERS, st.integers(0, 8)),
        st.tuples(st.sampled_from(["go", "go", "kill before", "kill after", "end"]), NUMBERS, st.integers(1, 8)),
    ),
    max_size=25,
)


@settings(max_examples=size(150, 5000), deadline=None)
@given(STEPS)
def test_whatever_is_interleaved_and_killed_nothing_acknowledged_is_lost_and_all_know_the_log_replayed(
    steps: list[tuple[str, int, int]],
) -> None:
    check(steps)


@pytest.mark.parametrize("kill", ["kill before", "kill after"])
@pytest.mark.parametrize("num_calls", range(14))
def test_whoever_is_killed_at_any_call_of_a_trim_leaves_the_log_or_a_snapshot(num_calls: int, kill: str) -> None:
    found = [("changes", 0, 4), ("compact", 0, 20), ("cut", 1, 0)]  # an hour after there is a snapshot
    check([*found, ("compact", 0, num_calls), (kill, 0, 1)])
    check([*found, ("compact", 0, num_calls), ("changes", 1, 3), ("cut", 1, 0), (kill, 0, 1), ("changes", 2, 1)])


def check(steps: list[tuple[str, int, int]]) -> None:
    world = World()
    servers = [Server(world) for _ in range(NUM_SERVERS)]
    with clocks(world):
        for what, number, count in steps:
            step(world, servers, servers[number], what, count)
        for server in servers:
            server.end()
            server.slept = 0.0  # its clocks are set at last
        world.now += 2 * compaction.GRACE_SECONDS
        last = max(world.made, default=0)
        for server in servers:
            if not server.has_changed:
                server.begin(server.look)
                server.end()
            if not server.has_changed:
                assert server.position.revision == last
                assert server.state == world.replayed(last)
            for entry in server.acknowledged:
                assert world.made[entry.revision] == entry
        assert not world.lost, world.lost
        assert not any(server.has_changed for server in servers) or any(what == "cut" and by for what, _, by in steps)
        fresh = Server(world)
        fresh.begin(fresh.look)
        fresh.end()
        assert fresh.state == world.replayed(last)


def step(world: World, servers: list[Server], server: Server, what: str, count: int) -> None:
    """Begin something, and make `count` calls. In a cut all sleep, and the clocks of those in `count` stand still."""
    if what == "cut":
        whole(server, server.compact)
        world.now += compaction.GRACE_SECONDS + 1
        for number, each in enumerate(servers):
            if count >> number & 1 and each is not server:
                each.slept += compaction.GRACE_SECONDS + 1
        whole(server, server.compact)
    elif what == "changes":
        for _ in range(count):
            whole(server, server.change)
    elif what in ("change", "look", "compact"):
        if not server.is_busy and not server.has_changed:
            server.begin(getattr(server, what))
            server.go_on(count)
    elif what == "end":
        server.end()
    elif what == "go":
        server.go_on(count)
    elif server.is_busy:
        server.let_on(what.removeprefix("kill "))


def whole(server: Server, job: Callable[[], None]) -> None:
    server.end()
    if not server.has_changed:
        server.begin(job)
        server.end()
