"""What the OpenAPI document says of answers, and of who may ask."""

from collections.abc import Collection, Mapping
from typing import Any

Schema = Mapping[str, Any]
Responses = dict[int | str, dict[str, Any]]
TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "integer"}
OBJECT: Schema = {"type": "object"}
REAL: Schema = {"type": "number"}
REALS: Schema = {"type": "array", "items": REAL}
VECTOR: Schema = {"anyOf": [REALS, {"type": "array", "items": REALS}, TEXT]}  # of each token one, or all as base64
OBJECTS: Schema = {"type": "array", "items": OBJECT}
_OR_NULL: Schema = {"type": ["string", "null"]}
_KEYS: Schema = {
    "key": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "as Anthropic's clients do"},
}


def object_of(**properties: Schema) -> Schema:
    """What has these properties, and perhaps more."""
    return {"type": "object", "required": [*properties], "properties": properties}


def answers(schema: Schema, *statuses: int) -> Responses:
    """JSON, by each of these statuses."""
    return {status: {"content": {"application/json": {"schema": schema}}} for status in statuses}


def streamed(schema: Schema) -> Responses:
    """JSON, or a stream of events where that is asked for."""
    described = answers(schema, 200)
    described[200]["content"]["text/event-stream"] = {"itemSchema": object_of(data=TEXT)}  # as FastAPI has it
    return described


def refused_as(schema: Schema) -> Responses:
    """JSON in place of what was asked for."""
    return {status: {"content": {"application/json": {"schema": schema}}} for status in ("4XX", "5XX")}


GENERATED = streamed(
    object_of(id=TEXT, object=TEXT, created=NUMBER, model=TEXT, choices=OBJECTS, usage=OBJECT, system_fingerprint=TEXT)
)


def listed_as(**item: Schema) -> Responses:
    """A list of such items, made of a request's inputs."""
    items: Schema = {"type": "array", "items": object_of(index=NUMBER, **item)}
    return answers(object_of(id=TEXT, object=TEXT, created=NUMBER, model=TEXT, data=items, usage=OBJECT), 200)


ERROR = object_of(error=object_of(message=TEXT, type=TEXT, param=_OR_NULL, code=TEXT))
REFUSED = refused_as(ERROR)


def with_keys(document: dict[str, Any], public: Collection[str]) -> dict[str, Any]:
    """The same, with a key asked for by every route that is not at one of the `public` paths."""
    wanted: list[dict[str, list[str]]] = [{name: []} for name in _KEYS]
    paths = {
        path: {
            method: operation | {"security": [] if path in public else wanted} for method, operation in found.items()
        }
        for path, found in document["paths"].items()
    }
    return document | {"paths": paths, "components": document.get("components", {}) | {"securitySchemes": _KEYS}}
