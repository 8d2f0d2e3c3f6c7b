"""What may have happened to one name, told from what its clients saw: a checker of linearizability.

A name is its versions, the one of them that it stands for, and the last version number that it gave out.
Every operation must have taken effect at one moment between its start and its end. All orders that these times allow
are searched, as by Wing and Gong (Testing and Verifying Concurrent Objects, 1993), with visited states remembered.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeVar

S = TypeVar("S")


class Happened(Protocol[S]):
    """One operation on a thing of state `S`. One whose answer nobody heard happened within its times or not at all."""

    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...
    @property
    def is_heard(self) -> bool: ...

    def applied_to(self, state: S) -> S | None:
        """The state afterwards, or None when `state` does not explain the answer."""


class State(NamedTuple):
    """A name's versions with their digests, and the one that is current, if there is any."""

    versions: tuple[tuple[int, str], ...] = ()
    current: int | None = None
    last_version: int = 0

    @property
    def digest(self) -> str | None:
        """What the name stands for."""
        return dict(self.versions).get(self.current or 0)

    def with_new(self, digest: str) -> "State":
        """After a put of other bytes than the current ones."""
        version = self.last_version + 1
        return State((*self.versions, (version, digest)), version, version)


@dataclass(frozen=True)
class Operation:
    """One operation on the name, and what it was answered: the version that it put, went to or read; None for a 404.

    A delete tells the newest version that it deleted. `digest` is what was put, or what a read saw; `wanted` is the
    version to roll to. One whose answer nobody heard happened within its times or not at all.
    """

    kind: Literal["put", "delete", "roll", "read"]
    start: float
    end: float
    digest: str | None = None
    version: int | None = None
    is_heard: bool = True
    wanted: int | None = None

    def applied_to(self, state: State) -> State | None:
        """The state afterwards, or None when `state` does not explain the answer."""
        after = self._after(state)
        if not self.is_heard:
            return after
        expected = {
            "put": after.current,
            "delete": state.versions[-1][0] if state.versions else None,
            "roll": self.wanted if self.wanted in dict(state.versions) else None,
            "read": state.current,
        }
        is_digest = self.kind in ("delete", "roll") or self.digest == after.digest
        return after if self.version == expected[self.kind] and is_digest else None

    def _after(self, state: State) -> State:
        if self.kind == "put" and self.digest is not None and state.digest != self.digest:
            return state.with_new(self.digest)
        if self.kind == "delete":
            return State(last_version=state.last_version)
        if self.kind == "roll" and self.wanted in dict(state.versions):
            return state._replace(current=self.wanted)
        return state


def final_states(operations: Sequence[Happened[S]], initial: Iterable[S]) -> frozenset[S]:
    """Every state that some order of `operations` can end in; none when no order explains all the answers."""
    earlier = [_mask(other.end < one.start for other in operations) for one in operations]
    heard = _mask(one.is_heard for one in operations)
    everything = (1 << len(operations)) - 1
    visited = {(everything, state) for state in initial}
    stack, ends = list(visited), set()
    while stack:
        remaining, state = stack.pop()
        if not remaining & heard:
            ends.add(state)
        for number, one in enumerate(operations):
            is_next = remaining >> number & 1 and not remaining & heard & earlier[number]
            after = one.applied_to(state) if is_next else None
            # what was not heard of and ended before this one began has not happened
            node = None if after is None else (remaining & ~(1 << number) & ~earlier[number], after)
            if node is not None and node not in visited:
                visited.add(node)
                stack.append(node)
    return frozenset(ends)


def _mask(bits: Iterable[bool]) -> int:
    return sum(1 << number for number, bit in enumerate(bits) if bit)
