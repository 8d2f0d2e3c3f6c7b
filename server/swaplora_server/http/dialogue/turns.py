"""A conversation as a chat template reads it, put together from the items or blocks of other APIs. Imports no torch."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, Tag

from swaplora_server.http.transport.models import LIST, TEXT, WireModel, text_or_list
from swaplora_server.service.errors import RequestError

MAX_ITEMS = 4096
MAX_TYPE_CHARACTERS = 64
MAX_ID_CHARACTERS = 256
Turn = dict[str, Any]  # role and content, calls and what they gave
Type = Annotated[str, Field(max_length=MAX_TYPE_CHARACTERS)]
CallId = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARACTERS)]


class Block(WireModel):
    """A part of what is said; those that are not text are refused by their type."""

    type: Type
    text: str | None = None


Said = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[list[Block], Field(max_length=MAX_ITEMS, fail_fast=True), Tag(LIST)],
    text_or_list("a string, or a list of blocks of text"),
]


def text_of(said: str | Sequence[Block], path: str, kinds: tuple[str, ...] = ("text",)) -> str:
    """What is said at `path`. Raises RequestError for a block that is not text."""
    if isinstance(said, str):
        return said
    for number, block in enumerate(said):
        if block.type not in kinds or block.text is None:
            raise unread(f"{path}[{number}]", block.type, kinds)
    return "".join(block.text or "" for block in said)


def unread(path: str, kind: str, kinds: Sequence[str]) -> RequestError:
    """The error for a block of a type that is not among those read there."""
    words = f"blocks of type {kind!r} are not read here, only {' and '.join(kinds)}"
    return RequestError("unsupported_field", f"{path}.type: {words}", f"{path}.type")


class Turns:
    """What was said, called and given back so far. Calls stand in the assistant's turn that they follow."""

    def __init__(self) -> None:
        self._turns: list[Turn] = []
        self._unanswered: dict[str, str] = {}  # the path of each call by its id

    def say(self, role: str, content: str) -> None:
        last = self._turns[-1] if self._turns else {}
        if role == "assistant" and last.keys() == {"role", "content", "reasoning_content"} and not last["content"]:
            last["content"] = content
        else:
            self._turns.append({"role": role, "content": content})

    def think(self, text: str) -> None:
        """Before what the assistant says and calls next; templates leave it out where it is of no use any more."""
        self._turns.append({"role": "assistant", "content": "", "reasoning_content": text})

    def call(self, call_id: str, name: str, arguments: dict[str, Any], path: str) -> None:
        """Raises RequestError for an id that waits for its result already."""
        if call_id in self._unanswered:
            raise RequestError("invalid_request", f"{path}: its id is that of another call", path)
        self._unanswered[call_id] = path
        function = {"name": name, "arguments": arguments}
        self._of_assistant().setdefault("tool_calls", []).append(
            {"id": call_id, "type": "function", "function": function}
        )

    def give(self, call_id: str, result: str, path: str) -> None:
        """What a call gave. Raises RequestError where there is no such call that waits for it."""
        if self._unanswered.pop(call_id, None) is None:
            raise RequestError("invalid_request", f"{path} is the result of no call before it", path)
        self._turns.append({"role": "tool", "tool_call_id": call_id, "content": result})

    def all(self) -> list[Turn]:
        """Raises RequestError for a call that has no result."""
        for path in self._unanswered.values():
            raise RequestError("invalid_request", f"{path} has no result: send what the call gave", path)
        return self._turns

    def _of_assistant(self) -> Turn:
        if not self._turns or self._turns[-1]["role"] != "assistant":
            self.say("assistant", "")
        return self._turns[-1]
