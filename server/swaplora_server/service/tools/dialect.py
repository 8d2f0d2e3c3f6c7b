"""What a base writes beside plain answers, and how its texts are read: reasoning first, then text and calls."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from swaplora_server.base.vocabulary import Vocabulary
from swaplora_server.service.tools.call_format import CallFormat
from swaplora_server.service.tools.reader import Part, Said
from swaplora_server.service.tools.readers import Reader, format_of
from swaplora_server.service.tools.reasoning import Marks, ReasoningReader

THINK = Marks("<think>", "</think>")
_KNOWN = (THINK, Marks("[THINK]", "[/THINK]"), Marks("<|channel>thought\n", "<channel|>"))
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")  # of transformers' response templates


@dataclass(frozen=True)
class Dialect:
    """How one base writes calls and reasoning."""

    calls: CallFormat
    thoughts: Marks | None  # None where reasoning is not told from the answer
    shown: frozenset[str]  # the special tokens that a text must show to be read

    def reader(self, prompt_end: str, calls: Reader | None, *, may_think: bool) -> "TextReader":
        """For one text behind a prompt that ends so."""
        marks = self.thoughts if may_think else None
        thoughts = ReasoningReader(marks, is_open=marks.is_open_in(prompt_end)) if marks else None
        return TextReader(thoughts, calls)


class TextReader:
    """The parts of one text as it grows."""

    def __init__(self, thoughts: ReasoningReader | None, calls: Reader | None) -> None:
        self._thoughts = thoughts
        self._calls = calls

    def push(self, text: str) -> list[Part]:
        """What is known by so much more text."""
        found: list[Part] = [Said(text)] if self._thoughts is None else [*self._thoughts.push(text)]
        return [*self._read(found)]

    def flush(self) -> list[Part]:
        """What is left at the end."""
        rest: list[Part] = [] if self._thoughts is None else [*self._thoughts.flush()]
        return [*self._read(rest), *(self._calls.flush() if self._calls else ())]

    def _read(self, parts: list[Part]) -> Iterator[Part]:
        for part in parts:
            if self._calls is not None and isinstance(part, Said):
                yield from self._calls.push(part.text)
            elif part.text:  # type: ignore[union-attr]  # nothing is called yet
                yield part


def dialect_of(
    tokenizer: PreTrainedTokenizerFast, vocabulary: Vocabulary, call_format: str, reasoning_format: str
) -> Dialect:
    """As the operator says, or `auto`: as the base's chat template and its response template show it."""
    template = _texts(tokenizer.chat_template)
    calls = format_of(template, call_format).of_tokens(vocabulary.special)
    marks = {"think": THINK, "none": None}.get(reasoning_format, _marks_of(tokenizer, template))
    names = [*calls.marks, *(marks or ())]
    shown = frozenset(name for name in vocabulary.special.values() if any(name in each for each in names))
    return Dialect(calls, marks, shown)


def _marks_of(tokenizer: PreTrainedTokenizerFast, template: str) -> Marks | None:
    fields = (getattr(tokenizer, "response_template", None) or {}).get("fields", {})
    for name in _REASONING_FIELDS:
        match fields.get(name):
            case {"open": str(begin), "close": str(end)}:
                return Marks(begin, end)
    return next((marks for marks in _KNOWN if marks.begin.strip() in template and marks.end in template), None)


def _texts(template: str | Mapping[str, Any] | None) -> str:
    """All templates of a base that has several by name."""
    return "\n".join(template.values()) if isinstance(template, Mapping) else template or ""
