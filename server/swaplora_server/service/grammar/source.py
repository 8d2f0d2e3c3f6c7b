"""What a client asks an answer to keep to, and how llguidance writes it."""

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from llguidance import LLMatcher, StructTag, grammar_from

MAX_BYTES = 256 << 10
# no longer than a line's indentation, so that no answer is made of it
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,20}"


class GrammarKind(StrEnum):
    """What the text of a source is."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"  # a JSON list of the texts that may be chosen
    LARK = "lark"
    GRAMMAR = "grammar"  # Lark's as llguidance has it, or GBNF
    STRUCTURAL_TAG = "structural_tag"  # JSON: structures and triggers


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """The text of a grammar, and the field that it came in."""

    kind: GrammarKind
    text: str
    param: str

    def written(self) -> str:
        """As llguidance takes it. Raises ValueError for what is none; the rest is found when it is compiled."""
        if len(self.text.encode(errors="surrogatepass")) > MAX_BYTES:
            raise ValueError(f"may have {MAX_BYTES} bytes")
        return _WRITERS[self.kind](self.text)


def json_text(value: Any) -> str:
    """A JSON value as text, its names in their order."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _json_schema(text: str) -> str:
    schema = _parsed(text)
    if not isinstance(schema, dict | bool):
        raise ValueError("must be a JSON schema: an object")
    return LLMatcher.grammar_from_json_schema(text, overrides={"lenient": False, "whitespace_pattern": WHITESPACE})


def _choice(text: str) -> str:
    choices = " | ".join(_literal(choice) for choice in json.loads(text))
    return LLMatcher.grammar_from_lark(f"start: {choices}")


def _grammar(text: str) -> str:
    try:
        return grammar_from("grammar", text)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"is neither Lark nor GBNF: {error.__context__ or error}") from error


def _structural_tag(text: str) -> str:
    value = _parsed(text)
    structures = value.get("structures") if isinstance(value, dict) else None
    triggers = value.get("triggers") if isinstance(value, dict) else None
    if not (isinstance(structures, list) and structures and isinstance(triggers, list)):
        raise ValueError('must be an object with "structures" and "triggers"')
    tags = [_tag(structure, triggers) for structure in structures]
    return LLMatcher.grammar_from_lark(StructTag.to_grammar(tags, assume_special=False))


def _tag(structure: Any, triggers: list[Any]) -> StructTag:
    match structure:
        case {"begin": str(begin), "schema": dict() | bool() as schema, "end": str(end)} if len(structure) == 3:
            for trigger in triggers:
                if isinstance(trigger, str) and trigger and begin.startswith(trigger):
                    return StructTag(trigger=trigger, begin=begin, grammar=json_text(schema), end=end)
            raise ValueError('has a "begin" that starts with none of the triggers')
        case _:
            raise ValueError('has a structure that is not {"begin": TEXT, "schema": {…}, "end": TEXT}')


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg}") from error


def _literal(text: str) -> str:
    """A text in Lark, which takes JSON's strings, but for the one control character that JSON lets stand."""
    if not text:
        raise ValueError("may not have an empty text")
    return json.dumps(text).replace("\x7f", r"\u007f")


_WRITERS = {
    GrammarKind.JSON_SCHEMA: _json_schema,
    GrammarKind.REGEX: LLMatcher.grammar_from_regex,
    GrammarKind.CHOICE: _choice,
    GrammarKind.LARK: LLMatcher.grammar_from_lark,
    GrammarKind.GRAMMAR: _grammar,
    GrammarKind.STRUCTURAL_TAG: _structural_tag,
}
