"""JSON schemas of many kinds, by a number: such that what keeps to one of them ends soon."""

import itertools
import json
import random
from typing import Any

Schema = dict[str, Any]
_MAX_DEPTH = 2
_FORMATS = ("date", "uuid", "ipv4")
_PATTERNS = ("^[a-c]{2,4}$", "^(yes|no)$", r"^\d{3}-\d{2}$", "^x?y$")


def distinct_cases(count: int) -> list[Schema]:
    """So many, no two of them alike."""
    found: dict[str, Schema] = {}
    for number in itertools.takewhile(lambda _: len(found) < count, itertools.count()):
        schema = schema_case(number)
        found[json.dumps(schema)] = schema
    return [*found.values()]


def schema_case(number: int) -> Schema:
    """The same one each time."""
    rng = random.Random(number)
    return _referring(rng) if number % 10 == 9 else _any(rng, 0)


def _any(rng: random.Random, depth: int) -> Schema:
    leaves = [_text, _integer, _number, _enum, _const, _boolean, _null, _pattern, _format]
    nodes = [_object, _object, _array, _tuple, _any_of, _all_of]
    return rng.choice(nodes if depth == 0 else leaves if depth >= _MAX_DEPTH else [*leaves, *nodes])(rng, depth)


def _text(rng: random.Random, _depth: int) -> Schema:
    shortest = rng.randrange(3)
    return {"type": "string", "minLength": shortest, "maxLength": shortest + rng.randrange(4)}


def _integer(rng: random.Random, _depth: int) -> Schema:
    least = rng.randrange(-1000, 1000)
    most = least + rng.randrange(5000)
    return rng.choice(
        (
            {"type": "integer", "minimum": least, "maximum": most},
            {"type": "integer", "exclusiveMinimum": least, "exclusiveMaximum": least + 10},
            {"type": "integer", "minimum": 0, "maximum": 99, "multipleOf": 7},
        )
    )


def _number(rng: random.Random, _depth: int) -> Schema:
    return {"type": "number", "enum": [rng.randrange(100) / 8, -1.5e-7, 0]}


def _enum(rng: random.Random, _depth: int) -> Schema:
    return {"enum": rng.sample(["a", 'quo"te', "é\n", "", 1, 2.5, None, True, [1, "b"], {"k": 0}], 4)}


def _const(rng: random.Random, _depth: int) -> Schema:
    return {"const": rng.choice(["fixed", 12, [1, 2], {"a": {"b": None}}, "\\ /"])}


def _boolean(_rng: random.Random, _depth: int) -> Schema:
    return {"type": "boolean"}


def _null(_rng: random.Random, _depth: int) -> Schema:
    return {"type": ["null", "boolean"]}


def _pattern(rng: random.Random, _depth: int) -> Schema:
    return {"type": "string", "pattern": rng.choice(_PATTERNS)}


def _format(rng: random.Random, _depth: int) -> Schema:
    return {"type": "string", "format": rng.choice(_FORMATS)}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(["id", "name", "größe", "a b", 'q"', "list"], rng.randrange(1, 4))
    required = [name for name in names if rng.random() < 0.6]
    properties = {name: _any(rng, depth + 1) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(rng: random.Random, depth: int) -> Schema:
    least = rng.randrange(2)
    return {"type": "array", "items": _any(rng, depth + 1), "minItems": least, "maxItems": least + rng.randrange(1, 3)}


def _tuple(rng: random.Random, depth: int) -> Schema:
    items = [_any(rng, depth + 1) for _ in range(2)]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": 2}


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth + 1) for _ in range(rng.randrange(1, 4))]}


def _all_of(rng: random.Random, _depth: int) -> Schema:
    least = rng.randrange(50)
    return {"allOf": [{"type": "integer", "minimum": least}, {"maximum": least + 40}]}


def _referring(rng: random.Random) -> Schema:
    """A tree that holds itself, and ends since its list does."""
    return {
        "$defs": {"leaf": _any(rng, _MAX_DEPTH), "node": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]}},
        "type": "array",
        "items": {"$ref": "#/$defs/node"},
        "maxItems": 3,
    }
