"""Calls whose arguments stand each between marks of its own, texts as they are and the rest as JSON: Qwen3-Coder's."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swaplora_server.service.errors import RequestError
from swaplora_server.service.grammar.source import MAX_BYTES, WHITESPACE, json_text
from swaplora_server.service.tools.call_format import CallFormat
from swaplora_server.service.tools.tool import Tool

FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
_DEFINITIONS = ("$defs", "definitions")
_OF_CALLS = {"type", "properties", "required", "additionalProperties", "title", "description", "$schema", *_DEFINITIONS}
_OF_TEXTS = {
    *("type", "minLength", "maxLength", "enum", "const", "title", "description", "default", "examples"),
    # of other types, which say nothing of a text
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("items", "prefixItems", "minItems", "maxItems", "properties", "required", "additionalProperties"),
}
_UNIONS = ("anyOf", "oneOf")
_STRINGS = frozenset({"string"})
_UNKNOWN: frozenset[str] = frozenset()
# what no text may have, since its end would be taken for that
_NO_END = r"& ~/(?s:.*)<\/parameter>(?s:.*)/"
_NO_JSON = r"& ~/\s*[-0-9{\[\"tfn](?s:.*)/"  # what begins so may be read as something else than text


@dataclass(frozen=True, kw_only=True)
class ParameterCalls(CallFormat):
    """`<function=NAME>`, then for each argument `<parameter=NAME>`, its value on lines of its own, `</parameter>`."""

    closing: str

    @property
    def marks(self) -> Sequence[str]:
        return self.mark, self.closing

    @property
    def example(self) -> str:
        parameter = f"{PARAMETER}ARGUMENT>\nVALUE\n{END_PARAMETER}\n"
        return f"{self.before}{FUNCTION}NAME>\n{parameter}{END_FUNCTION}{self.after}"

    def call_text(self, name: str, arguments: Mapping[str, Any]) -> str:
        parameters = "".join(
            f"{PARAMETER}{name}>\n{value if isinstance(value, str) else json_text(value)}\n{END_PARAMETER}\n"
            for name, value in arguments.items()
        )
        return f"{FUNCTION}{name}>\n{parameters}{END_FUNCTION}"

    def tool_rules(self, rule: str, tool: Tool, *, is_lenient: bool) -> str:
        """Raises RequestError for parameters that cannot be held to in this form."""
        head, tail = json.dumps(f"{FUNCTION}{tool.name}>\n"), json.dumps(END_FUNCTION)
        if is_lenient:
            value = f'{rule}_value[lazy]: /(?s:.*)/ "{END_PARAMETER}\\n"'
            return f'{rule}: {head} ("{PARAMETER}" /[^>\\n]+/ ">\\n" {rule}_value)* {tail}\n{value}'
        schema = tool.parameters.value if tool.parameters else {}
        _check(tool.name, schema)
        properties, required = schema.get("properties", {}), schema.get("required", ())
        rules: list[str] = []
        for number, (name, value) in enumerate(properties.items()):
            rules += _parameter_rules(f"{rule}_{number}", tool.name, name, _with_definitions(value, schema))
            if sum(map(len, rules)) > MAX_BYTES:  # references make much of little
                raise _refusal(tool.name, f"so much as {name!r} and those before it are")
        parts = [f"{rule}_{number}{'' if name in required else '?'}" for number, name in enumerate(properties)]
        return "\n".join([f"{rule}: {' '.join([head, *parts, tail])}", *rules])


QWEN3_CODER = ParameterCalls(
    name="qwen3_coder",
    mark="<tool_call>",
    sign=FUNCTION,
    closing="</tool_call>",
    before="<tool_call>\n",
    between="\n</tool_call>\n<tool_call>\n",
    after="\n</tool_call>",
)


def kinds_of(schema: object, root: Mapping[str, Any], known: dict[str, frozenset[str]] | None = None) -> frozenset[str]:
    """JSON's types that a value of this schema may have; none where it does not say."""
    known = {} if known is None else known
    if not isinstance(schema, Mapping):
        return _UNKNOWN
    if isinstance(reference := schema.get("$ref"), str):
        if reference not in known:
            known[reference] = _UNKNOWN  # each is looked at once, and may lead to itself
            known[reference] = kinds_of(_referred(reference, root), root, known)
        return known[reference]
    match schema.get("type"):
        case str(kind):
            return frozenset({kind})
        case [*kinds]:
            return frozenset(map(str, kinds))
    for union in _UNIONS:
        if isinstance(branches := schema.get(union), list):
            of_each = [kinds_of(branch, root, known) for branch in branches]
            return frozenset().union(*of_each) if all(of_each) else _UNKNOWN
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return frozenset(map(kind_of, values)) if isinstance(values, list) else _UNKNOWN


def kind_of(value: object) -> str:
    """JSON's type of a value."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def value_in(text: str, kinds: frozenset[str]) -> Any:
    """What a parameter's text says: a text of one of these kinds, or whatever JSON it is, or the text itself."""
    if kinds == _STRINGS:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)  # as some templates write them
    kind = kind_of(value)
    is_of_kinds = kind in kinds or (kind == "integer" and "number" in kinds)
    return text if "string" in kinds and (kind == "string" or not is_of_kinds) else value


def _referred(reference: str, root: Mapping[str, Any]) -> object:
    """The definition that a reference names, or None."""
    found: object = root
    for key in reference.removeprefix("#/").split("/"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _with_definitions(value: object, schema: Mapping[str, Any]) -> Mapping[str, Any]:
    definitions = {name: schema[name] for name in _DEFINITIONS if name in schema and '"$ref"' in json_text(value)}
    return {**(value if isinstance(value, Mapping) else {}), **definitions}


def _check(tool: str, schema: Mapping[str, Any]) -> None:
    """Raise RequestError for what is said of all arguments together."""
    properties = schema.get("properties", {})
    names = [*properties] if isinstance(properties, Mapping) else []
    unheld = next((name for name in schema if name not in _OF_CALLS), None)
    unnamed = next((name for name in schema.get("required", ()) if name not in names), None)
    odd = next((name for name in names if not name or re.search(r"[>\n]", name)), None)
    for word in (unheld, unnamed, odd):
        if word is not None:
            raise _refusal(tool, f"{word!r} of its parameters")
    if not isinstance(properties, Mapping):
        raise _refusal(tool, "its properties, which are no object")


def _refusal(tool: str, what: str) -> RequestError:
    message = (
        f"tools: {tool!r} cannot be held to {what}: this base writes each argument by itself, texts without quotes; "
        "leave it out, or let the model decide: tool_choice auto, and no strict"
    )
    return RequestError("invalid_request", message, "tools")


def _parameter_rules(rule: str, tool: str, name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    """Of one argument: what stands around its value, and the value."""
    values = [*_value_rules(rule, tool, name, schema, schema)]
    yield f"{rule}: {json.dumps(f'{PARAMETER}{name}>' + chr(10))} ({' | '.join(one for one, _ in values)})"
    yield from (line for _, line in values if line)


_END = json.dumps(f"\n{END_PARAMETER}\n")


def _value_rules(
    rule: str, tool: str, name: str, schema: Mapping[str, Any], root: Mapping[str, Any], *, is_branch: bool = False
) -> Iterator[tuple[str, str]]:
    """Alternatives for a value and its end, each with what defines it."""
    if isinstance(reference := schema.get("$ref"), str) and isinstance(found := _referred(reference, root), Mapping):
        schema = {**{key: value for key, value in schema.items() if key != "$ref"}, **found}
    kinds = kinds_of(schema, root)
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and values:
        yield from ((f"{json.dumps(one if isinstance(one, str) else json_text(one))} {_END}", "") for one in values)
    elif kinds and "string" not in kinds:
        own = {**schema, "x-guidance": {"lenient": False, "whitespace_pattern": WHITESPACE}}
        yield f"{rule}_json {_END}", f"{rule}_json: %json {json_text(own)}"
    elif kinds <= _STRINGS and not any(union in schema for union in _UNIONS):
        yield _text_rule(rule, tool, name, schema, is_alone=True)
    elif is_branch:
        raise _refusal(tool, f"alternatives within those of {name!r}")
    else:
        yield from _union_rules(rule, tool, name, schema, root)


def _union_rules(
    rule: str, tool: str, name: str, schema: Mapping[str, Any], root: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Of a value that may be a text or something else."""
    branches = next((schema[union] for union in _UNIONS if isinstance(schema.get(union), list)), None)
    if branches is None:
        if not isinstance(schema.get("type"), list):
            raise _refusal(tool, f"what {name!r} refers to")
        branches = [{**schema, "type": kind} for kind in schema["type"]]
    for number, branch in enumerate(branches):
        of_branch = _with_definitions(branch, root)
        if kinds_of(of_branch, root) == _STRINGS and not {"enum", "const"} & {*of_branch}:
            yield _text_rule(f"{rule}_{number}", tool, name, of_branch, is_alone=False)
        else:
            yield from _value_rules(f"{rule}_{number}", tool, name, of_branch, root, is_branch=True)


def _text_rule(rule: str, tool: str, name: str, schema: Mapping[str, Any], *, is_alone: bool) -> tuple[str, str]:
    """Of a text, as it is."""
    if unheld := next((key for key in schema if key not in _OF_TEXTS and key not in _DEFINITIONS), None):
        raise _refusal(tool, f"{unheld!r} of {name!r}")
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    length = f"{{{least},{most}}}" if least or most != "" else "*"
    terminal = f"{rule.upper()}_TEXT"
    defined = f"{terminal}: /(?s:.{length})/ {_NO_END}{'' if is_alone else f' {_NO_JSON}'}"
    return f"{rule}_text", f"{rule}_text[lazy]: {terminal} {_END}\n{defined}"
