"""What may have happened to one name, told from what its clients saw: a checker of linearizability.

A name is a register of two fields: the digest that it stands for, if any, and the last version number it gave out.
Every operation must have taken effect at one moment between its start and its end. All orders that these times allow
are searched, as by Wing and Gong (Testing and Verifying Concurrent Objects, 1993), with visited states remembered.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


class State(NamedTuple):
    """What a name stands for."""

    digest: str | None = None
    last_version: int = 0


@dataclass(frozen=True)
class Operation:
    """One operation on the name, and what it was answered: the version that it put, deleted or read; None for a 404.

    `digest` is what was put, or what a read saw. One whose answer nobody heard happened within its times or not at all.
    """

    kind: Literal["put", "delete", "read"]
    start: float
    end: float
    digest: str | None = None
    version: int | None = None
    is_heard: bool = True

    def applied_to(self, state: State) -> State | None:
        """The state afterwards, or None when `state` does not explain the answer."""
        after = state
        if self.kind == "put" and state.digest != self.digest:
            after = State(self.digest, state.last_version + 1)
        elif self.kind == "delete":
            after = State(None, state.last_version)
        named = after if self.kind == "put" else state
        is_version = self.version == (None if named.digest is None else named.last_version)
        is_digest = self.kind == "delete" or self.digest == named.digest
        return after if not self.is_heard or (is_version and is_digest) else None


def final_states(operations: Sequence[Operation], initial: Iterable[State]) -> frozenset[State]:
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
