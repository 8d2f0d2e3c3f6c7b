"""What a model thinks before it answers, taken apart from its answer as the text grows."""

from collections.abc import Iterator
from enum import Enum, auto
from typing import NamedTuple

from swaplora_server.service.tools.reader import Said, Thought, num_held


class Marks(NamedTuple):
    """What stands before a model's reasoning, and what behind it."""

    begin: str
    end: str

    def is_open_in(self, prompt: str) -> bool:
        """Whether a prompt that ends so has the model begin by reasoning."""
        return prompt.rstrip().endswith(self.begin.rstrip())


class _State(Enum):
    START = auto()
    THOUGHT = auto()
    BEHIND = auto()  # the reasoning, where white space is not text
    TEXT = auto()


class ReasoningReader:
    """The reasoning that a text begins with, and the rest. White space around the reasoning belongs to neither."""

    def __init__(self, marks: Marks, *, is_open: bool) -> None:
        """With `is_open`, the text begins in the middle of it."""
        self._marks = marks
        self._state = _State.THOUGHT if is_open else _State.START
        self._held = ""
        self._has_thought = False

    def push(self, text: str) -> list[Said | Thought]:
        """What is known by so much more text."""
        self._held += text
        parts: list[Said | Thought] = []
        state = None
        while state is not self._state:
            state = self._state
            parts += self._step()
        return parts

    def flush(self) -> list[Said | Thought]:
        """What is left at the end."""
        state, held = self._state, self._held
        self._held = ""
        if state is _State.THOUGHT:
            return list(self._thought(held.rstrip()))
        return [Said(held)] if held and state is _State.START else []

    def _step(self) -> Iterator[Said | Thought]:
        begin, rest = self._marks.begin, self._held.lstrip()
        match self._state:
            case _State.START if rest.startswith(begin):
                self._state, self._held = _State.THOUGHT, rest[len(begin) :]
            case _State.START if not begin.startswith(rest):
                self._state = _State.TEXT
            case _State.THOUGHT:
                yield from self._in_thought()
            case _State.BEHIND if rest:
                self._state, self._held = _State.TEXT, rest
            case _State.TEXT if self._held:
                text, self._held = self._held, ""
                yield Said(text)

    def _in_thought(self) -> Iterator[Thought]:
        before, mark, rest = self._held.partition(self._marks.end)
        known = before if mark else before[: len(before) - num_held(before, self._marks.end)]
        text = known.rstrip()
        self._held = before[len(text) :]
        if mark:
            self._state, self._held = _State.BEHIND, rest
        yield from self._thought(text)

    def _thought(self, text: str) -> Iterator[Thought]:
        text = text if self._has_thought else text.lstrip()
        if text:
            self._has_thought = True
            yield Thought(text)
