"""Calls of tools, read out of a text as it grows."""

import json
import re
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from swaplora_server.service.grammar.source import json_text
from swaplora_server.service.tools.tool import BEGIN, END

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)', re.DOTALL)


class Said(NamedTuple):
    """Text that is in no call."""

    text: str


class Called(NamedTuple):
    """A call begins: the one of this number in its text."""

    number: int
    call_id: str
    name: str


class Argued(NamedTuple):
    """The next piece of a call's arguments, which together are JSON."""

    number: int
    text: str


Part = Said | Called | Argued


class _State(Enum):
    TEXT = auto()
    HEAD = auto()  # of a call, until its arguments begin
    ARGUMENTS = auto()
    TAIL = auto()  # what stands behind them, up to the mark that ends the call


@dataclass(slots=True)
class _ObjectEnd:
    """Finds where a JSON object ends."""

    depth: int = 0
    is_in_string: bool = False
    is_escaped: bool = False

    def find(self, text: str) -> int | None:
        """How much of `text` belongs to it, if it ends there."""
        for place, character in enumerate(text):
            if self.is_in_string:
                self._within_string(character)
            elif character == '"':
                self.is_in_string = True
            else:
                self.depth += (character in "{[") - (character in "}]")
                if not self.depth:
                    return place + 1
        return None

    def _within_string(self, character: str) -> None:
        if self.is_escaped or character == "\\":
            self.is_escaped = not self.is_escaped
        elif character == '"':
            self.is_in_string = False


class CallReader:
    """The parts of one text. What is no well-formed call of one of the tools stays text; nothing is lost but marks."""

    def __init__(self, names: Collection[str], *, is_one: bool = False) -> None:
        """With `is_one`, only the first call is told."""
        self._names = names
        self._is_one = is_one
        self._state = _State.TEXT
        self._held = ""
        self._end = _ObjectEnd()
        self.num_calls = 0

    def push(self, text: str) -> list[Part]:
        """What is known by so much more text."""
        self._held += text
        found: list[Part] = []
        while (parts := self._step()) is not None:
            found += parts
        return [part for part in found if self._is_told(part)]

    def flush(self) -> list[Part]:
        """What is left at the end: a call whose last mark is missing is one all the same."""
        state, held = self._state, self._held
        self._state, self._held = _State.TEXT, ""
        if state is _State.TEXT:
            parts = list(self._text(held))
        elif state is _State.HEAD:
            parts = self._whole(held, "")
        else:
            parts = []
        return [part for part in parts if self._is_told(part)]

    def _is_told(self, part: Part) -> bool:
        return isinstance(part, Said) or not (self._is_one and part.number)

    def _step(self) -> list[Part] | None:
        """The parts up to the next change of state, or None when more text is needed for one."""
        match self._state:
            case _State.TEXT:
                return self._in_text()
            case _State.HEAD:
                return self._in_head()
            case _State.ARGUMENTS:
                return self._in_arguments()
            case _State.TAIL:
                _, mark, rest = self._held.partition(END)
                if mark:
                    self._enter(_State.TEXT, rest)
                return [] if mark else None

    def _enter(self, state: _State, held: str) -> None:
        self._state, self._held = state, held

    def _in_text(self) -> list[Part] | None:
        before, mark, rest = self._held.partition(BEGIN)
        if mark:
            self._enter(_State.HEAD, rest)
            return list(self._text(before))
        length = len(before) - _num_held(before)
        if self.num_calls and not before[:length].strip():
            return None  # perhaps nothing but what stands between two calls
        self._held = before[length:]
        return list(self._text(before[:length])) or None

    def _in_head(self) -> list[Part] | None:
        match = _HEAD.match(self._held)
        name = _name(match[1]) if match else None
        if match and name in self._names:
            self._enter(_State.ARGUMENTS, self._held[match.end() :])
            self._end = _ObjectEnd()
            return [self._called(str(name))]
        block, mark, rest = self._held.partition(END)
        if not mark:
            return None
        self._enter(_State.TEXT, rest)
        return self._whole(block, END)

    def _in_arguments(self) -> list[Part] | None:
        length = self._end.find(self._held)
        text, rest = self._held[:length], "" if length is None else self._held[length:]
        self._enter(_State.ARGUMENTS if length is None else _State.TAIL, rest)
        return [Argued(self.num_calls - 1, text)] if text else None

    def _whole(self, block: str, mark: str) -> list[Part]:
        """A call that came as a whole, or the text that it is not."""
        try:
            call = json.loads(block)
        except (ValueError, RecursionError):
            call = None
        match call:
            case {"name": str(name), "arguments": dict() as arguments} if name in self._names:
                return [self._called(name), Argued(self.num_calls - 1, json_text(arguments))]
            case _:
                return [Said(f"{BEGIN}{block}{mark}")]

    def _called(self, name: str) -> Called:
        self.num_calls += 1
        return Called(self.num_calls - 1, f"call_{uuid.uuid4().hex[:24]}", name)

    def _text(self, text: str) -> Iterator[Part]:
        """White space behind a call is not text by itself."""
        if text and not (self.num_calls and not text.strip()):
            yield Said(text)


def _name(literal: str) -> object:
    try:
        return json.loads(literal)
    except ValueError:
        return None


def _num_held(text: str) -> int:
    """How many of its last characters may be the beginning of a call's mark."""
    return next((n for n in range(min(len(BEGIN) - 1, len(text)), 0, -1) if text.endswith(BEGIN[:n])), 0)
