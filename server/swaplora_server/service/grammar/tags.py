"""Structural tags: text with parts that keep to formats, as xgrammar has them, in Lark as llguidance reads it.

The older form has `structures` and `triggers`, the newer one a `format`, of the types that stand below.
"""

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from llguidance import StructTag
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

MAX_TAGS = 256
_TOLD_PARTS = 12  # of the way to what is wrong


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Const(_Closed):
    type: Literal["const_string"]
    value: Annotated[str, Field(min_length=1)]


class _Schema(_Closed):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] | bool
    style: Literal["json"] = "json"


class _Regex(_Closed):
    type: Literal["regex"]
    pattern: Annotated[str, Field(min_length=1)]


class _AnyText(_Closed):
    type: Literal["any_text"]


class _Sequence(_Closed):
    type: Literal["sequence"]
    elements: Annotated[list["_Format"], Field(min_length=1)]


class _Or(_Closed):
    type: Literal["or"]
    elements: Annotated[list["_Format"], Field(min_length=1)]


class _Tag(_Closed):
    type: Literal["tag"] = "tag"
    begin: str
    content: "_Format"
    end: str


class _Triggered(_Closed):
    type: Literal["triggered_tags"]
    triggers: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    tags: Annotated[list[_Tag], Field(min_length=1)]
    at_least_one: bool = False
    stop_after_first: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        for tag in self.tags:
            _trigger_of(tag.begin, self.triggers)
        return self


class _Separated(_Closed):
    type: Literal["tags_with_separator"]
    tags: Annotated[list[_Tag], Field(min_length=1)]
    separator: str
    at_least_one: bool = False
    stop_after_first: bool = False


_Format = Annotated[
    _Const | _Schema | _Regex | _AnyText | _Sequence | _Or | _Tag | _Triggered | _Separated, Field(discriminator="type")
]


class _Newer(_Closed):
    type: Literal["structural_tag"] = "structural_tag"
    format: _Format


class _Structure(_Closed):
    begin: str
    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")]
    end: str


class _Older(_Closed):
    type: Literal["structural_tag"] = "structural_tag"
    structures: Annotated[list[_Structure], Field(min_length=1, max_length=MAX_TAGS)]
    triggers: list[str]


_NEWER, _OLDER = TypeAdapter(_Newer), TypeAdapter(_Older)


def lark_of_tags(value: Any) -> str:
    """A grammar of either form. Raises ValueError for what is none, and for what cannot be kept to."""
    if not isinstance(value, dict):
        raise ValueError('must be an object with "format", or with "structures" and "triggers"')
    try:
        if "format" in value:
            return _Writer().grammar(_NEWER.validate_python(value).format)
        return _older(_OLDER.validate_python(value))
    except ValidationError as error:
        raise ValueError(_complaint(error)) from None


def _older(value: _Older) -> str:
    tags = [
        StructTag(
            trigger=_trigger_of(one.begin, value.triggers), begin=one.begin, grammar=_text(one.schema_), end=one.end
        )
        for one in value.structures
    ]
    return StructTag.to_grammar(tags, assume_special=False)


class _Writer:
    """Writes a rule for each part of a format."""

    def __init__(self) -> None:
        self._rules: list[str] = []

    def grammar(self, format_: _Format) -> str:
        """The whole of it. Raises ValueError."""
        whole = self._written(format_, is_last=True)
        return "\n".join(["%llguidance {}", f"start: {whole}", r"TEXT: /(.|\n)*/", *self._rules])

    def _rule(self, body: str, attributes: str = "") -> str:
        if len(self._rules) >= MAX_TAGS:
            raise ValueError(f"may have {MAX_TAGS} parts")
        name = f"part_{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {body}")
        return name

    def _written(self, format_: _Format, *, is_last: bool) -> str:
        """A rule's name. `is_last`: nothing comes behind it."""
        match format_:
            case _Const():
                return self._rule(quoted(format_.value))
            case _Schema():
                return self._rule(f"%json {_text(format_.json_schema)}")
            case _Regex():
                return self._rule(_slashed(format_.pattern))
            case _AnyText():
                if not is_last:
                    raise ValueError(
                        "has any_text where its end cannot be known: make it the content of a tag with an end, or last"
                    )
                return self._rule("TEXT")
            case _Sequence():
                *first, last = format_.elements
                parts = [self._written(element, is_last=False) for element in first]
                return self._rule(" ".join([*parts, self._written(last, is_last=is_last)]))
            case _Or():
                return self._rule(self._either(format_.elements, is_last=is_last))
            case _Tag():
                return self._rule(f"{quoted(format_.begin)} {self._inside(format_, is_last=is_last)}")
            case _Triggered():
                return self._triggered(format_, is_last=is_last)
            case _Separated():
                return self._separated(format_, is_last=is_last)

    def _either(self, formats: Sequence[_Format], *, is_last: bool) -> str:
        return " | ".join(self._written(one, is_last=is_last) for one in formats)

    def _inside(self, tag: _Tag, *, is_last: bool) -> str:
        """A tag behind its beginning."""
        if isinstance(tag.content, _AnyText) and tag.end:
            return self._rule(f"TEXT {quoted(tag.end)}", "[lazy]")
        content = self._written(tag.content, is_last=is_last and not tag.end)
        return f"{content} {quoted(tag.end)}"

    def _triggered(self, format_: _Triggered, *, is_last: bool) -> str:
        """With text before, between and behind, but for the first that must be: that comes at once."""
        if not is_last:
            raise ValueError("has triggered_tags that are not last: what is text then cannot be known")
        found = []
        for tag in format_.tags:
            trigger = _trigger_of(tag.begin, format_.triggers)
            head = self._rule(f"TEXT {quoted(trigger)}", "[lazy]")
            inside = self._inside(tag, is_last=False)
            found.append(self._rule(f"{head} {quoted(tag.begin.removeprefix(trigger))} {inside}"))
        later = self._rule(" | ".join(found))
        if not format_.at_least_one:
            return self._rule(f"{later} | TEXT" if format_.stop_after_first else f"{later}* TEXT")
        first = self._rule(self._either(format_.tags, is_last=False))
        return first if format_.stop_after_first else self._rule(f"{first} {later}* TEXT")

    def _separated(self, format_: _Separated, *, is_last: bool) -> str:
        is_single = format_.stop_after_first
        one = self._rule(self._either(format_.tags, is_last=is_last and is_single))
        all_ = one if is_single else self._rule(f"{one} ({quoted(format_.separator)} {one})*")
        return all_ if format_.at_least_one else self._rule(f"{all_}?")


def _trigger_of(begin: str, triggers: Sequence[str]) -> str:
    """Raises ValueError where there is none."""
    for trigger in triggers:
        if trigger and begin.startswith(trigger):
            return trigger
    raise ValueError('has a "begin" that starts with none of the triggers')


def quoted(text: str) -> str:
    """A text in Lark; of no text nothing."""
    return alternatives([text]) if text else ""


def alternatives(texts: Sequence[str]) -> str:
    """Texts between bars, none of them empty. Lark takes strings of JSON, but for a control character in them."""
    return json.dumps(texts, separators=(" | ", ":"))[1:-1].replace("\x7f", r"\u007f")


def _slashed(pattern: str) -> str:
    """A regular expression in Lark, whose end is a slash, in one line."""
    return (
        "/" + re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", pattern, flags=re.DOTALL).replace("\n", r"\n") + "/"
    )


def _text(schema: dict[str, Any] | bool) -> str:
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))


def _complaint(error: ValidationError) -> str:
    """The first thing wrong and where, without the value."""
    first = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"][-_TOLD_PARTS:])
    return f"{place}: {first['msg'].removeprefix('Value error, ')}" if place else first["msg"]
