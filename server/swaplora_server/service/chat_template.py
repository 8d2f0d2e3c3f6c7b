"""A conversation as one text, by the base's own chat template, which must leave nothing of it out.

Many templates pass over messages without a word: of a role that they do not know, or a system message that is not the
first. What a template does with a message depends on the roles and where they stand, not on what is said. So the same
conversation with a mark for each content tells what becomes of it: short to render, and once for all of its shape.
A message's name is given to the template as well, which may pass over it: clients put one there for their own use.
"""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from swaplora_server.service.errors import RequestError
from swaplora_server.service.tools.call_format import HERMES, CallFormat
from swaplora_server.service.tools.prompt import with_tools

_MAX_SHAPES = 256  # remembered
_MAX_REMEMBERED_MESSAGES = 64
_MAX_REMEMBERED_CHARACTERS = 1024  # of the variables
_MAX_NAMED = 8
_MARK = re.compile(r"zq\d+qz")
_PROBE = "zqtoolqz"
Message = Mapping[str, Any]


class _Part(NamedTuple):
    """A message, but for what it says."""

    role: str
    has_content: bool
    has_name: bool


class _Shape(NamedTuple):
    parts: tuple[_Part, ...]
    variables: str  # JSON
    options: tuple[tuple[str, bool], ...]


class ChatTemplate:
    """Renders for any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, calls: CallFormat = HERMES) -> None:
        """`calls`: how calls are written where the template does not know how."""
        self._tokenizer = tokenizer
        self._calls = calls
        self._options = inspect.signature(tokenizer.apply_chat_template).parameters.keys()
        self._remembered = lru_cache(_MAX_SHAPES)(self._left_out)

    def render(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] = (),
        **options: bool,
    ) -> str:
        """The text; the template sees `variables` as variables.

        One that knows no tools is given them, their calls and their results as text.

        Raises RequestError when the template refuses the conversation or leaves something of it out, and for a variable
        that is really an option of the renderer's.
        """
        if reserved := sorted(variables.keys() & self._options):
            raise RequestError(
                "unsupported_field", f"{', '.join(reserved)} cannot be given here", "chat_template_kwargs"
            )
        if self._tokenizer.chat_template is None:
            raise RequestError("invalid_request", "the base has no chat template; use /v1/completions", "messages")
        if (tools or any("tool_calls" in m or m["role"] == "tool" for m in messages)) and not self._knows_tools:
            messages, tools = with_tools(messages, tools, self._calls), ()
        try:
            text = self._apply(messages, variables, options, tools)
        except TemplateError as error:
            raise RequestError("invalid_request", f"the chat template refuses this: {error}", "messages") from error
        except (TypeError, ValueError) as error:
            raise RequestError(
                "invalid_request", "the chat template cannot make a prompt of this", "messages"
            ) from error
        if left_out := self._look(_shape(messages, variables, options)):
            told = [words for _, words in left_out[:_MAX_NAMED]]
            raise RequestError("unsupported_field", ". ".join(told), left_out[0][0])
        return text

    @cached_property
    def _knows_tools(self) -> bool:
        """Whether it writes what tools there are."""
        tool = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": {"type": "object"}}}
        try:
            return _PROBE in self._apply([{"role": "user", "content": "hi"}], {}, {}, [tool])
        except (TemplateError, TypeError, ValueError):
            return False

    def _apply(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        options: Mapping[str, bool],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        given = {"tools": list(tools)} if tools else {}
        return str(self._tokenizer.apply_chat_template(list(messages), tokenize=False, **given, **options, **variables))

    def _look(self, shape: _Shape) -> list[tuple[str, str]]:
        is_small = len(shape.parts) <= _MAX_REMEMBERED_MESSAGES
        is_small = is_small and len(shape.variables) <= _MAX_REMEMBERED_CHARACTERS
        return self._remembered(shape) if is_small else self._left_out(shape)

    def _left_out(self, shape: _Shape) -> list[tuple[str, str]]:
        """The path of each thing that the template leaves out, and the words for it."""
        marked = [_marked(number, part) for number, part in enumerate(shape.parts)]
        try:
            text = self._apply(marked, json.loads(shape.variables), dict(shape.options))
        except (TemplateError, TypeError, ValueError):
            return []  # it looks at what is said: then it is taken at its word
        marks, found = set(_MARK.findall(text.lower())), []
        for number, (part, message) in enumerate(zip(shape.parts, marked, strict=True)):
            path = f"messages[{number}]"
            if part.has_content and message["content"] not in marks:
                words = f"{path} is of role {part.role!r}, which the base's chat template leaves out there"
                found.append((path, f"{words}; send it in another role, such as user"))
        return found


def _shape(messages: Sequence[Message], variables: Mapping[str, Any], options: Mapping[str, bool]) -> _Shape:
    parts = tuple(_Part(m["role"], bool(m["content"].strip()), "name" in m) for m in messages)
    return _Shape(parts, json.dumps(variables), tuple(sorted(options.items())))


def _marked(number: int, part: _Part) -> Message:
    content = f"zq{number}qz" if part.has_content else ""
    return {"role": part.role, "content": content} | ({"name": f"n{number}"} if part.has_name else {})
