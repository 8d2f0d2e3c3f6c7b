"""Functions that a model may call."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swaplora_server.service.grammar.source import WHITESPACE, json_text

_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function. Without parameters it takes none."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    is_strict: bool = False

    @property
    def definition(self) -> dict[str, Any]:
        """As chat templates and OpenAI have it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}

    @property
    def schema(self) -> str:
        """Of its arguments, such that keywords that are not known are refused."""
        schema = {**(_NO_PARAMETERS if self.parameters is None else self.parameters)}
        return json_text({**schema, "x-guidance": {"lenient": False, "whitespace_pattern": WHITESPACE}})
