"""What a client asks an answer to keep to, and how llguidance writes it."""

import json
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

from llguidance import LLMatcher
from pydantic_core import to_json

from swaplora_server.service.grammar.gbnf import is_lark, lark_of
from swaplora_server.service.grammar.tags import alternatives, lark_of_tags
from swaplora_server.service.offload import GilTurns

MAX_BYTES = 256 << 10
GBNF_SECONDS = 5.0
# no longer than a line's indentation, so that no answer is made of it
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,20}"
_OPTIONS = '"x-guidance":' + json.dumps({"lenient": False, "whitespace_pattern": WHITESPACE})


class GrammarKind(StrEnum):
    """What the text of a source is."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"  # a JSON list of the texts that may be chosen
    LARK = "lark"
    GRAMMAR = "grammar"  # Lark's as llguidance has it, or GBNF
    STRUCTURAL_TAG = "structural_tag"  # JSON


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """The text of a grammar, and the field that it came in."""

    kind: GrammarKind
    text: str
    param: str

    def written(self, turns: GilTurns) -> str:
        """As llguidance takes it. Raises ValueError for what is none; the rest is found when it is compiled."""
        check_size(self.text)
        if self.kind is GrammarKind.GRAMMAR:
            return self.text if is_lark(self.text) else lark_of(self.text, GBNF_SECONDS)
        return turns.do(partial(_WRITERS[self.kind], self.text))


def check_size(text: str) -> None:
    """Raise ValueError for a text that is larger than any that is compiled."""
    if len(text) > MAX_BYTES or len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        raise ValueError(f"may have {MAX_BYTES} bytes")


def json_text(value: Any) -> str:
    """A JSON value as text, its names in their order."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def body_text(value: Any) -> str:
    """The same of a value from a body, in a third of the time. Raises ValueError."""
    return to_json(value).decode()


def with_options(schema: str) -> str:
    """The text of a schema, an object, such that keywords that are not known are refused."""
    opened = schema.rstrip().removesuffix("}")
    return f"{opened}{'' if opened.strip() == '{' else ','}{_OPTIONS}}}"


def _json_schema(text: str) -> str:
    """In Lark, which llguidance reads with the interpreter let go of, and a schema without."""
    schema = _parsed(text)
    if not isinstance(schema, dict | bool):
        raise ValueError("must be a JSON schema: an object")
    if not isinstance(schema, dict) or "x-guidance" in schema:
        return LLMatcher.grammar_from_json_schema(text, overrides={"lenient": False, "whitespace_pattern": WHITESPACE})
    return LLMatcher.grammar_from_lark(f"start: %json {with_options(text)}")


def _choice(text: str) -> str:
    """A terminal, which however many choices are one item of a parser's row."""
    choices = json.loads(text)
    if "" in choices:
        raise ValueError("may not have an empty text")
    return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {alternatives(choices)}")


def _structural_tag(text: str) -> str:
    return LLMatcher.grammar_from_lark(lark_of_tags(_parsed(text)))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg}") from error


_WRITERS = {
    GrammarKind.JSON_SCHEMA: _json_schema,
    GrammarKind.REGEX: LLMatcher.grammar_from_regex,
    GrammarKind.CHOICE: _choice,
    GrammarKind.LARK: LLMatcher.grammar_from_lark,
    GrammarKind.STRUCTURAL_TAG: _structural_tag,
}
