"""What an answer's text must keep to, in the fields of OpenAI, vLLM, SGLang and llama.cpp. Imports no torch."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator

from swaplora_server.http.transport.models import ClosedModel, WireModel
from swaplora_server.service.errors import RequestError
from swaplora_server.service.grammar.source import (
    MAX_BYTES,
    GrammarKind,
    GrammarSource,
    body_text,
    check_size,
    json_text,
)

MAX_CHOICES = 16_384
MAX_NAME_CHARACTERS = 64
MAX_DESCRIPTION_CHARACTERS = 16_384


def _text_of_schema(value: object) -> str:
    """Raises ValueError for what is none."""
    if not isinstance(value, dict | bool):
        raise ValueError("must be a JSON schema: an object")
    return _text_of_body(value)


def _text_of_value(value: object) -> str:
    """Raises ValueError for what is neither a JSON schema nor one that is written as a text."""
    if not isinstance(value, str):
        return _text_of_schema(value)
    check_size(value)
    return value


def _text_of_part(value: object) -> str:
    """Raises ValueError for what no structural tag has."""
    if not isinstance(value, dict | list):
        raise ValueError("must be an object or a list")
    return _text_of_body(value)


def _text_of_body(value: object) -> str:
    """Raises ValueError for what is too large."""
    text = body_text(value)
    check_size(text)
    return text


def _checked(choices: list[str]) -> list[str]:
    """Raises ValueError for more than are compiled."""
    if sum(map(len, choices)) > MAX_BYTES:
        raise ValueError(f"may have {MAX_BYTES} bytes")
    return choices


Text = Annotated[str, Field(max_length=MAX_BYTES)]
Choices = Annotated[list[Text], Field(max_length=MAX_CHOICES, fail_fast=True), AfterValidator(_checked)]
# values of bodies become texts while these are read, which for large ones is not on the event loop
SchemaText = Annotated[str, PlainValidator(_text_of_schema, json_schema_input_type=dict[str, Any] | bool)]
JsonText = Annotated[str, PlainValidator(_text_of_value, json_schema_input_type=dict[str, Any] | bool | str)]
PartText = Annotated[str, PlainValidator(_text_of_part, json_schema_input_type=dict[str, Any] | list[Any])]
ANY_OBJECT = '{"type":"object"}'


class NamedSchema(ClosedModel):
    """OpenAI's. A schema is always kept to, strict or not; without one, the text is any JSON object."""

    name: Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)] | None = None
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION_CHARACTERS)] | None = None
    schema_: Annotated[SchemaText | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(ClosedModel):
    """`schema` beside json_object is llama.cpp's, and structural_tag is vLLM's, in its newer form and in its older."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: NamedSchema | None = None
    schema_: Annotated[SchemaText | None, Field(alias="schema")] = None
    format: PartText | None = None
    structures: PartText | None = None
    triggers: PartText | None = None

    def source(self) -> GrammarSource | None:
        """None for plain text. Raises RequestError for what belongs to another type."""
        self._check_parts()
        match self.type:
            case "text":
                return None
            case "json_object":
                return _schema_source("response_format", "schema", self.schema_)
            case "json_schema":
                schema = self.json_schema.schema_ if self.json_schema else None
                return _schema_source("response_format", "json_schema.schema", schema)
            case "structural_tag":
                parts = [f'"{name}":{value}' for name, value in self._tag_parts().items() if value is not None]
                return GrammarSource(GrammarKind.STRUCTURAL_TAG, f"{{{','.join(parts)}}}", "response_format")

    def _tag_parts(self) -> dict[str, str | None]:
        return {"format": self.format, "structures": self.structures, "triggers": self.triggers}

    def _check_parts(self) -> None:
        """Raise RequestError for a part that does not go with the type, or the one that it needs and has not."""
        of_tag = self._tag_parts()
        own = {"json_object": ["schema"], "json_schema": ["json_schema"], "structural_tag": [*of_tag]}.get(
            self.type, []
        )
        for name, value in {"json_schema": self.json_schema, "schema": self.schema_, **of_tag}.items():
            if value is not None and name not in own:
                path = f"response_format.{name}"
                raise RequestError("invalid_request", f"{path} does not go with the type {self.type!r}", path)
        if self.type == "json_schema" and self.json_schema is None:
            path = "response_format.json_schema"
            raise RequestError("invalid_request", f"{path} is needed with the type 'json_schema'", path)


class StructuredOutputs(ClosedModel):
    """vLLM's: exactly one of them."""

    json_: Annotated[JsonText | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: Text | None = None
    choice: Annotated[Choices, Field(min_length=1)] | None = None
    grammar: Text | None = None
    structural_tag: JsonText | None = None

    def sources(self) -> Iterator[GrammarSource]:
        """One for each that is asked for."""
        under = "structured_outputs."
        if self.json_ is not None:
            yield schema_source(f"{under}json", self.json_)
        if self.json_object:
            yield schema_source(f"{under}json_object", ANY_OBJECT)
        if self.regex is not None:
            yield GrammarSource(GrammarKind.REGEX, self.regex, f"{under}regex")
        if self.choice is not None:
            yield GrammarSource(GrammarKind.CHOICE, json_text(self.choice), f"{under}choice")
        if self.grammar is not None:
            yield GrammarSource(GrammarKind.GRAMMAR, self.grammar, f"{under}grammar")
        if self.structural_tag is not None:
            yield GrammarSource(GrammarKind.STRUCTURAL_TAG, self.structural_tag, f"{under}structural_tag")


class FormatBody(WireModel):
    """The fields of a body that say what the text keeps to: one at most. An empty text or list asks for nothing."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonText | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None
    json_schema: JsonText | None = None
    regex: Text | None = None
    ebnf: Text | None = None
    grammar: Text | None = None
    structural_tag: JsonText | None = None

    def format_source(self) -> GrammarSource | None:
        """What the text keeps to. Raises RequestError where two fields say so."""
        sources = [*self._sources()]
        if len(sources) > 1:
            told = " and ".join(source.param for source in sources)
            raise RequestError("invalid_request", f"{told} exclude each other: send one of them", sources[1].param)
        return sources[0] if sources else None

    def _sources(self) -> Iterator[GrammarSource]:
        if self.response_format is not None and (source := self.response_format.source()):
            yield source
        if self.structured_outputs is not None:
            of_outputs = [*self.structured_outputs.sources()]
            if not of_outputs:
                path = "structured_outputs"
                known = "json, json_object, regex, choice, grammar, structural_tag"
                raise RequestError("invalid_request", f"{path} must have one of {known}", path)
            yield from of_outputs
        for param, kind, value in self._aliases():
            if value not in (None, "", []):
                yield GrammarSource(kind, value if isinstance(value, str) else json_text(value), param)

    def _aliases(self) -> Iterator[tuple[str, GrammarKind, Any]]:
        yield "guided_json", GrammarKind.JSON_SCHEMA, self.guided_json
        yield "guided_regex", GrammarKind.REGEX, self.guided_regex
        yield "guided_choice", GrammarKind.CHOICE, self.guided_choice
        yield "guided_grammar", GrammarKind.GRAMMAR, self.guided_grammar
        yield "json_schema", GrammarKind.JSON_SCHEMA, self.json_schema
        yield "regex", GrammarKind.REGEX, self.regex
        yield "ebnf", GrammarKind.GRAMMAR, self.ebnf
        yield "grammar", GrammarKind.GRAMMAR, self.grammar
        yield "structural_tag", GrammarKind.STRUCTURAL_TAG, self.structural_tag


def schema_source(param: str, text: str) -> GrammarSource:
    """What keeps to a JSON schema, given as text in the field `param`."""
    return GrammarSource(GrammarKind.JSON_SCHEMA, text, param)


def _schema_source(param: str, below: str, text: str | None) -> GrammarSource:
    """The same of a field that lies `below` another, which stands for any object where it is not there."""
    return schema_source(param, ANY_OBJECT) if text is None else schema_source(f"{param}.{below}", text)
