"""JSON schemas and regular expressions of strangers: their cost is bounded, and nothing is fetched."""

import json
from functools import lru_cache
from typing import Any, NoReturn

from jsonschema_rs import RegexOptions, ValidationError, Validator, validator_for

from swaplora_server.evaluation.unfolded import check_unfolded

_PATTERNS = RegexOptions(size_limit=1 << 20, dfa_size_limit=1 << 20)


def schema_validator(schema: dict[str, Any] | bool) -> Validator:
    """Of a JSON schema of any draft. Raises ValueError for what is none, or unfolds to too much: `check_unfolded`."""
    return _compiled(json.dumps(schema))


def regex_validator(regex: str) -> Validator:
    """Of texts that the expression matches anywhere. Raises ValueError for what is none; it has no look-around."""
    return _compiled(json.dumps({"type": "string", "pattern": regex}))


@lru_cache(maxsize=64)
def _compiled(schema: str) -> Validator:
    parsed = json.loads(schema)
    if isinstance(parsed, dict):
        check_unfolded(parsed)
    try:
        return validator_for(parsed, pattern_options=_PATTERNS, retriever=_refuse)
    except ValidationError as error:
        raise ValueError(error.message) from error


def _refuse(uri: str) -> NoReturn:
    raise ValueError(f"{uri[:200]} is not in the schema, and nothing is fetched")
