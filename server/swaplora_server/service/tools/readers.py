"""The forms in which bases write calls, and who reads each."""

from collections.abc import Sequence
from typing import Protocol

from swaplora_server.service.tools.call_format import (
    HERMES,
    LLAMA3_JSON,
    MISTRAL,
    MISTRAL_NAMED,
    CallFormat,
    ObjectCalls,
)
from swaplora_server.service.tools.parameter_calls import QWEN3_CODER, ParameterCalls
from swaplora_server.service.tools.parameter_reader import ParameterReader
from swaplora_server.service.tools.reader import CallReader, Part
from swaplora_server.service.tools.tool import Tool

# of those that begin alike the one first that has more to be known by
FORMATS = (QWEN3_CODER, HERMES, LLAMA3_JSON, MISTRAL_NAMED, MISTRAL)
NAMES = tuple(dict.fromkeys(form.name for form in FORMATS))


class Reader(Protocol):
    """Of one text's calls."""

    def push(self, text: str) -> list[Part]:
        """What is known by so much more text."""

    def flush(self) -> list[Part]:
        """What is left at the end."""


def format_of(template: str, name: str = "auto") -> CallFormat:
    """The one that a chat template writes, of those of this name.

    Where none is recognised it is Hermes', which any base may be told of, or the name's oldest.
    """
    named = [form for form in FORMATS if name in ("auto", form.name)]
    return next((form for form in named if form.is_written_by(template)), HERMES if name == "auto" else named[-1])


def reader_of(form: CallFormat, tools: Sequence[Tool], *, is_one: bool = False) -> Reader:
    """Of one text in this form, which may call these; with `is_one`, only the first call is told."""
    if isinstance(form, ParameterCalls):
        return ParameterReader(tools, form, is_one=is_one)
    assert isinstance(form, ObjectCalls)
    return CallReader({tool.name for tool in tools}, form=form, is_one=is_one)
