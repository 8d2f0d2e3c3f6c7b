"""Functions that a model may call."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swaplora_server.service.grammar.source import with_options


@dataclass(frozen=True, slots=True)
class Parameters:
    """The JSON schema of a function's arguments."""

    value: Mapping[str, Any]
    text: str  # the same, written where the body was read


_NO_PARAMETERS = '{"type":"object","properties":{},"additionalProperties":false}'


@dataclass(frozen=True, slots=True)
class Tool:
    """A function. Without parameters it takes none."""

    name: str
    description: str | None = None
    parameters: Parameters | None = None
    is_strict: bool = False

    @property
    def definition(self) -> dict[str, Any]:
        """As chat templates and OpenAI have it."""
        parameters = self.parameters and self.parameters.value
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}

    @property
    def num_characters(self) -> int:
        """Of its definition, about."""
        return len(self.name) + len(self.description or "") + (len(self.parameters.text) if self.parameters else 0)

    @property
    def schema(self) -> str:
        """Of its arguments, such that keywords that are not known are refused."""
        return with_options(_NO_PARAMETERS if self.parameters is None else self.parameters.text)
