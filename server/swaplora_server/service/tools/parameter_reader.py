"""Calls whose arguments stand each between marks of its own, read out of a text as it grows."""

import json
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from enum import Enum, auto

from swaplora_server.service.grammar.source import json_text
from swaplora_server.service.tools.parameter_calls import (
    END_FUNCTION,
    END_PARAMETER,
    FUNCTION,
    PARAMETER,
    ParameterCalls,
    kinds_of,
    value_in,
)
from swaplora_server.service.tools.reader import PIECE, Argued, Called, Part, Said, num_held
from swaplora_server.service.tools.tool import Tool

_STRINGS = frozenset({"string"})
_END_LINE = f"\n{END_PARAMETER}"


class _State(Enum):
    TEXT = auto()
    HEAD = auto()  # of a call, until its name is known
    BETWEEN = auto()  # two arguments
    VALUE = auto()  # of an argument
    BEHIND = auto()  # a call: here what closes it may follow


class ParameterReader:
    """The parts of one text. What does not begin as a call of one of the tools stays text.

    An argument that is a text comes in pieces, any other as a whole.
    """

    def __init__(self, tools: Sequence[Tool], form: ParameterCalls, *, is_one: bool = False) -> None:
        """With `is_one`, only the first call is told."""
        self._tools = {tool.name: tool for tool in tools}
        self._form = form
        self._is_one = is_one
        self._state = _State.TEXT
        self._held = ""
        self._before = ""  # a call that is not known for one yet: what is text if it is none
        self._tool: Tool | None = None
        self._kinds: frozenset[str] = frozenset()
        self._has_begun = False  # the value that is being read
        self._num_scanned = 0  # characters of it, in which its end is not
        self._num_arguments = 0
        self._is_behind_call = False
        self.num_calls = 0

    def push(self, text: str) -> list[Part]:
        """What is known by so much more text."""
        found: list[Part] = []
        steps: dict[_State, Callable[[], list[Part] | None]] = {
            _State.TEXT: self._in_text,
            _State.HEAD: self._in_head,
            _State.BETWEEN: self._between,
            _State.VALUE: self._in_value,
            _State.BEHIND: self._behind,
        }
        for start in range(0, len(text), PIECE):  # each step copies what it leaves
            self._held += text[start : start + PIECE]
            while (parts := steps[self._state]()) is not None:
                found += parts
        return [part for part in found if self._is_told(part)]

    def flush(self) -> list[Part]:
        """What is left at the end. A call that was cut has what is known of its arguments."""
        state, text = self._state, self._before + self._held
        self._enter(_State.TEXT, "")
        if state in (_State.TEXT, _State.HEAD):
            return list(self._text(text))
        if state is _State.VALUE and self._kinds == _STRINGS and self._has_begun:
            return [part for part in self._argued(_escaped(text)) if self._is_told(part)]
        return []

    def _is_told(self, part: Part) -> bool:
        return not (self._is_one and isinstance(part, Called | Argued) and part.number)

    def _enter(self, state: _State, held: str, before: str = "") -> list[Part]:
        self._state, self._held, self._before = state, held, before
        return []

    def _in_text(self) -> list[Part] | None:
        before, mark, rest = self._held.partition(self._form.mark)
        if mark:
            self._enter(_State.HEAD, rest, mark)
            return list(self._text(before))
        known = before[: len(before) - num_held(before, self._form.mark)]
        if self._is_behind_call and not known.strip():
            return None  # perhaps nothing but what stands between two calls
        self._held = before[len(known) :]
        return list(self._text(known)) or None

    def _in_head(self) -> list[Part] | None:
        rest = self._held.lstrip()
        if len(rest) < len(FUNCTION) and FUNCTION.startswith(rest):
            return None
        name, end, behind = rest.removeprefix(FUNCTION).partition(">")
        if rest.startswith(FUNCTION) and not end and any(known.startswith(name) for known in self._tools):
            return None
        if not rest.startswith(FUNCTION) or not end or name not in self._tools:
            text, held = self._before, self._held
            self._enter(_State.TEXT, held)
            return list(self._text(text))
        self._tool, self._num_arguments, self._is_behind_call = self._tools[name], 0, True
        self.num_calls += 1
        self._enter(_State.BETWEEN, behind)
        return [Called(self.num_calls - 1, f"call_{uuid.uuid4().hex[:24]}", name)]

    def _between(self) -> list[Part] | None:
        """What is neither an argument nor the end is nothing."""
        match = _NEXT.search(self._held)
        if match is None:
            begin = self._held.rfind("<")
            self._held = "" if begin < 0 else self._held[begin:]
            return None
        rest = self._held[match.end() :]
        if match[1] is None:
            if match[0] == self._form.mark:
                rest = self._held[match.start() :]
            self._enter(_State.BEHIND, rest)
            return self._argued("}" if self._num_arguments else "{}")
        self._enter(_State.VALUE, rest)
        self._begin(match[1])
        head = "," if self._num_arguments else "{"
        self._num_arguments += 1
        return self._argued(f"{head}{json_text(match[1])}:")

    def _begin(self, name: str) -> None:
        """An argument of this name."""
        parameters = self._tool and self._tool.parameters
        schema = parameters.value if parameters else {}
        properties = schema.get("properties")
        self._kinds = _STRINGS
        if isinstance(properties, dict) and name in properties:
            self._kinds = kinds_of(properties[name], schema)
        self._has_begun, self._num_scanned = False, 0

    def _in_value(self) -> list[Part] | None:
        if self._kinds == _STRINGS:
            return self._in_string()
        end = self._held.find(END_PARAMETER, self._num_scanned)
        while end >= 0 and not self._is_end(end):
            self._num_scanned = end + 1
            end = self._held.find(END_PARAMETER, self._num_scanned)
        if end < 0:
            return None
        value = value_in(self._held[:end].removeprefix("\n").removesuffix("\n"), self._kinds)
        self._enter(_State.BETWEEN, self._held[end + len(END_PARAMETER) :])
        return self._argued(json_text(value))

    def _is_end(self, place: int) -> bool:
        """Whether the mark at `place` is no part of the JSON before it, whose texts have no line breaks."""
        if "string" in self._kinds or not self._kinds or self._held[:place].endswith("\n"):
            return True
        if not self._held[:place].lstrip().startswith(('"', "{", "[")):
            return True
        try:
            json.loads(self._held[:place])
        except (ValueError, RecursionError):
            return False
        return True

    def _in_string(self) -> list[Part] | None:
        if not self._has_begun:
            if not self._held:
                return None
            self._has_begun, self._held = True, self._held.removeprefix("\n")
            return self._argued('"')
        text, mark, rest = self._held.partition(END_PARAMETER)
        if mark:
            self._enter(_State.BETWEEN, rest)
            return self._argued(f'{_escaped(text.removesuffix(chr(10)))}"')
        num_kept = max(num_held(text, _END_LINE), num_held(text, END_PARAMETER))
        known = text[: len(text) - num_kept]
        self._held = text[len(known) :]
        return self._argued(_escaped(known)) if known else None

    def _behind(self) -> list[Part] | None:
        rest, closing = self._held.lstrip(), self._form.closing
        if not rest or (closing.startswith(rest) and rest != closing):
            return None
        return self._enter(_State.TEXT, rest[len(closing) :] if rest.startswith(closing) else self._held)

    def _argued(self, text: str) -> list[Part]:
        return [Argued(self.num_calls - 1, text)] if text else []

    def _text(self, text: str) -> Iterator[Part]:
        """White space behind a call is not text by itself."""
        if text and not (self._is_behind_call and not text.strip()):
            self._is_behind_call = False
            yield Said(text)


_NEXT = re.compile(rf"{PARAMETER}([^>]*)>|{END_FUNCTION}|</?tool_call>")


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
