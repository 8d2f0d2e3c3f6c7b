"""Things that many clients write, remove and read, for history.py: one with a value, and room for some names."""

from dataclasses import dataclass
from typing import Literal

NOTHING = ""


@dataclass(frozen=True)
class Access:
    """Of a thing with one value: what was written or read, NOTHING for what is not there.

    A removal is told by `value` whether there was something: NOTHING if not.
    """

    kind: Literal["write", "remove", "read"]
    start: float
    end: float
    value: str
    is_heard: bool = True

    def applied_to(self, state: str) -> str | None:
        if self.kind == "write":
            return self.value
        if self.kind == "remove":
            is_right = not self.is_heard or (self.value == NOTHING) == (state == NOTHING)
            return NOTHING if is_right else None
        return state if self.value == state or not self.is_heard else None


@dataclass(frozen=True)
class Take:
    """Of room for `room` names: a name that is put or deleted, and whether that was done; or all names there are."""

    kind: Literal["put", "delete", "list"]
    start: float
    end: float
    room: int
    names: frozenset[str]
    was_done: bool = True
    is_heard: bool = True

    def applied_to(self, state: frozenset[str]) -> frozenset[str] | None:
        if self.kind == "list":
            return state if self.names == state or not self.is_heard else None
        if self.kind == "delete":
            after, is_possible = state - self.names, self.names <= state
        else:
            after, is_possible = state | self.names, len(state | self.names) <= self.room
        if self.is_heard and self.was_done != is_possible:
            return None
        return after if is_possible else state
