"""Calls of tools, read out of a text as it grows."""

import json
import re
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from typing import NamedTuple

from swaplora_server.service.grammar.source import json_text
from swaplora_server.service.tools.call_format import HERMES, ObjectCalls


class Said(NamedTuple):
    """Text that is in no call."""

    text: str


class Thought(NamedTuple):
    """Text by which the model reasons before it answers."""

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


Part = Said | Thought | Called | Argued


PIECE = 4096  # characters


class _State(Enum):
    START = auto()  # where a call may stand without a mark
    TEXT = auto()
    HEAD = auto()  # of a call, until its arguments begin
    ARGUMENTS = auto()
    REST = auto()  # of the call's object, behind them
    BEHIND = auto()  # a call: here another may follow, or what closes them


@dataclass(slots=True)
class _ObjectEnd:
    """Finds where a JSON object ends."""

    depth: int = 0
    is_nested: bool = False  # whether something has begun within it
    is_in_string: bool = False
    is_escaped: bool = False

    def find(self, text: str) -> int | None:
        """How much of `text`, which goes on where the last one ended, belongs to it, if it ends there."""
        for place, character in enumerate(text):
            if self.is_in_string:
                self._within_string(character)
            elif character == '"':
                self.is_in_string = True
            else:
                self.depth += (character in "{[") - (character in "}]")
                self.is_nested |= self.depth > 1
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

    def __init__(self, names: Collection[str], *, form: ObjectCalls = HERMES, is_one: bool = False) -> None:
        """With `is_one`, only the first call is told."""
        self._names = names
        self._form = form
        self._is_one = is_one
        self._state = _State.START if form.is_bare else _State.TEXT
        self._held = ""
        self._before = ""  # a call that is not known for one yet: what is text if it is none
        self._opening = ""  # what is still to come before its object
        self._num_scanned = 0  # characters of that object, in which its end is not
        self._first_quote = -1  # where its first string begins, if it has one
        self._end = _ObjectEnd()
        self._is_object = True  # the call: its arguments are a part of one
        self._is_behind_call = False
        self.num_calls = 0

    def push(self, text: str) -> list[Part]:
        """What is known by so much more text."""
        found: list[Part] = []
        for start in range(0, len(text), PIECE):  # each step copies what it leaves
            self._held += text[start : start + PIECE]
            while (parts := self._step()) is not None:
                found += parts
        return [part for part in found if self._is_told(part)]

    def flush(self) -> list[Part]:
        """What is left at the end: a call whose last mark is missing is one all the same."""
        state, text = self._state, self._before + self._held
        self._enter(_State.TEXT, "")
        return list(self._text(text)) if state in (_State.START, _State.TEXT, _State.HEAD) else []

    def _is_told(self, part: Part) -> bool:
        return not (self._is_one and isinstance(part, Called | Argued) and part.number)

    def _step(self) -> list[Part] | None:
        """The parts up to the next change of state, or None when more text is needed for one."""
        match self._state:
            case _State.START:
                return self._at_start()
            case _State.TEXT:
                return self._in_text()
            case _State.HEAD:
                return self._in_head()
            case _State.ARGUMENTS:
                return self._in_arguments()
            case _State.REST:
                return self._in_rest()
            case _State.BEHIND:
                return self._behind()

    def _enter(self, state: _State, held: str, before: str = "") -> list[Part]:
        self._state, self._held, self._before = state, held, before
        self._opening = ""
        return []

    def _enter_head(self, held: str, before: str, opening: str = "") -> list[Part]:
        self._enter(_State.HEAD, held, before)
        self._opening, self._num_scanned, self._first_quote, self._end = opening, 0, -1, _ObjectEnd()
        return []

    def _at_start(self) -> list[Part] | None:
        rest = self._held.lstrip()
        if not rest:
            return None
        if rest.startswith("{"):
            return self._enter_head(rest, self._held[: -len(rest)])
        return self._enter(_State.TEXT, self._held)

    def _in_text(self) -> list[Part] | None:
        before, mark, rest = self._held.partition(self._form.mark)
        if mark:
            self._enter_head(rest, mark, self._form.opening)
            return list(self._text(before))
        length = len(before) - num_held(before, self._form.mark)
        if self._is_behind_call and not before[:length].strip():
            return None  # perhaps nothing but what stands between two calls
        self._held = before[length:]
        return list(self._text(before[:length])) or None

    def _in_head(self) -> list[Part] | None:
        """Each character is looked at once, however long the head grows."""
        rest = self._held.lstrip()
        self._before += self._held[: len(self._held) - len(rest)]
        self._held = rest
        if not rest:
            return None
        if self._form.named and self._opening and not rest.startswith(self._opening):
            return self._in_named_head(rest)
        if self._opening:
            if not rest.startswith(self._opening):
                return self._no_call(rest)
            return self._enter_head(rest.removeprefix(self._opening), self._before + self._opening)
        if not rest.startswith("{") or not self._may_be_call(rest):
            return self._no_call(rest)
        was_nested = self._end.is_nested
        end = self._end.find(rest[self._num_scanned :])
        if self._end.is_nested and not was_nested and (called := self._begun(rest)):
            return called
        if end is None:
            self._num_scanned = len(rest)
            return None
        length = self._num_scanned + end
        return self._whole(rest[:length], rest[length:])

    def _in_named_head(self, rest: str) -> list[Part] | None:
        """Of a name and then the arguments."""
        match = _named_head(self._form.named, self._form.numbered).match(rest)
        if match and match[1] in self._names:
            return self._enter_arguments(match[1], rest[match.end() :], is_object=False)
        name, behind = _split_name(rest)
        if not behind and any(known.startswith(name) for known in self._names):
            return None
        cut = _named_head(self._form.named, self._form.numbered, is_cut=True)
        return None if name in self._names and cut.fullmatch(rest) else self._no_call(rest)

    def _enter_arguments(self, name: str, rest: str, *, is_object: bool) -> list[Part]:
        self._enter(_State.ARGUMENTS, rest)
        self._end, self._is_object = _ObjectEnd(), is_object
        return [self._called(name)]

    def _may_be_call(self, text: str) -> bool:
        """An object without a mark may be an answer, which is not held back once its first name is none of a call's."""
        if not self._form.is_bare:
            return True
        if self._first_quote < 0:
            self._first_quote = text.find('"', self._num_scanned)
        if self._first_quote < 0:
            return True
        names = [f'"{name}"' for name in ("name", "type", self._form.arguments)]
        return any(name.startswith(text[self._first_quote : self._first_quote + len(name)]) for name in names)

    def _begun(self, text: str) -> list[Part]:
        """The call that an object begins, when something has begun within it: if it is one, its arguments."""
        match = _head(self._form.arguments).match(text)
        name = _name(match[1]) if match else None
        if match is None or name not in self._names:
            return []
        return self._enter_arguments(str(name), text[match.end() :], is_object=True)

    def _in_arguments(self) -> list[Part] | None:
        length = self._end.find(self._held)
        text, rest = self._held[:length], "" if length is None else self._held[length:]
        behind = _State.REST if self._is_object else _State.TEXT
        self._enter(_State.ARGUMENTS if length is None else behind, rest)
        if length is not None:
            self._end = _ObjectEnd(depth=1)
        return [Argued(self.num_calls - 1, text)] if text else None

    def _in_rest(self) -> list[Part] | None:
        length = self._end.find(self._held)
        if length is None:
            self._held = ""
            return None
        return self._enter(_State.BEHIND, self._held[length:])

    def _behind(self) -> list[Part] | None:
        rest = self._held.lstrip()
        form = self._form
        if not rest or (form.closing.startswith(rest) and rest != form.closing):
            return None
        if form.separator and rest.startswith(form.separator):
            length = len(self._held) - len(rest) + len(form.separator)
            return self._enter_head(self._held[length:], self._held[:length])
        return self._enter(_State.TEXT, rest[len(form.closing) :] if rest.startswith(form.closing) else self._held)

    def _whole(self, block: str, rest: str) -> list[Part]:
        """A call that came as a whole, or the text that it is not."""
        try:
            call = json.loads(block)
        except (ValueError, RecursionError):
            call = None
        name = call.get("name") if isinstance(call, dict) else None
        arguments = call.get(self._form.arguments) if isinstance(call, dict) else None
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return self._no_call(rest, block)
        self._enter(_State.BEHIND, rest)
        return [self._called(name), Argued(self.num_calls - 1, json_text(arguments))]

    def _no_call(self, rest: str, block: str = "") -> list[Part]:
        text = self._before + block
        self._enter(_State.TEXT, rest)
        return list(self._text(text))

    def _called(self, name: str) -> Called:
        self.num_calls += 1
        self._is_behind_call = True
        return Called(self.num_calls - 1, f"call_{uuid.uuid4().hex[:24]}", name)

    def _text(self, text: str) -> Iterator[Part]:
        """White space behind a call is not text by itself."""
        if text and not (self._is_behind_call and not text.strip()):
            self._is_behind_call = False
            yield Said(text)


@cache
def _head(arguments: str) -> re.Pattern[str]:
    return re.compile(rf'\{{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"{arguments}"\s*:\s*(?=\{{)', re.DOTALL)


@cache
def _named_head(mark: str, id_mark: str, *, is_cut: bool = False) -> re.Pattern[str]:
    """A name, perhaps an id, and the mark before the arguments; or the beginning of that."""
    named, call = re.escape(mark), r"[\w.-]+(?:" + re.escape(id_mark) + r"[\w-]{0,64})?"
    if not is_cut:
        return re.compile(rf"(?P<name>[\w.-]+)(?:{re.escape(id_mark)}[\w-]{{0,64}})?{named}\s{{0,64}}(?=\{{)", re.ASCII)
    beginnings = "|".join(_beginning(each) for each in (id_mark, mark))
    return re.compile(rf"{call}(?:{beginnings}|{named}\s{{0,64}})", re.ASCII)


def _beginning(mark: str) -> str:
    """Each of its beginnings."""
    return "|".join(re.escape(mark[:length]) for length in range(len(mark) + 1))


def _split_name(text: str) -> tuple[str, str]:
    name = re.match(r"[\w.-]*", text, re.ASCII)
    length = name.end() if name else 0
    return text[:length], text[length:]


def _name(literal: str) -> object:
    try:
        return json.loads(literal)
    except ValueError:
        return None


def num_held(text: str, mark: str) -> int:
    """How many of its last characters may be the beginning of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
