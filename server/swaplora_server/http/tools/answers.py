"""A text's calls as OpenAI's objects: in a message, and in the deltas of a stream."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from swaplora_server.http.tools.wire import ToolUse
from swaplora_server.service.tools.reader import Argued, Called, CallReader, Part, Said


class ToolAnswers:
    """What becomes of the choices of one chat that may call tools."""

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._readers: defaultdict[int, CallReader] = defaultdict(use.reader)  # of the choices that are streamed

    def message(self, text: str, finish_reason: str | None) -> tuple[dict[str, Any], str | None]:
        """An assistant's message of the whole text, and why it ended."""
        reader = self._use.reader()
        parts = [*reader.push(text), *reader.flush()]
        said = "".join(part.text for part in parts if isinstance(part, Said))
        calls = [_call(part, parts) for part in parts if isinstance(part, Called)]
        message: dict[str, Any] = {"role": "assistant", "content": said or (None if calls else "")}
        if calls:
            message |= {"function_call": calls[0]["function"]} if self._use.is_legacy else {"tool_calls": calls}
        return message, self._use.finish_reason(finish_reason, len(calls))

    def deltas(self, choice: int, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        """Those of so much more text of a choice."""
        reader = self._readers[choice]
        parts = [*reader.push(text), *(reader.flush() if is_last else ())]
        return [_legacy_delta(part) if self._use.is_legacy else _delta(part) for part in parts]

    def finish_reason(self, choice: int, reason: str | None) -> str | None:
        """Of a choice all of whose text has come."""
        return self._use.finish_reason(reason, self._readers[choice].num_calls)


def _call(called: Called, parts: Sequence[Part]) -> dict[str, Any]:
    arguments = "".join(part.text for part in parts if isinstance(part, Argued) and part.number == called.number)
    return {"id": called.call_id, "type": "function", "function": {"name": called.name, "arguments": arguments}}


def _delta(part: Part) -> dict[str, Any]:
    match part:
        case Said(text):
            return {"content": text}
        case Called(index, call_id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        case Argued(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _legacy_delta(part: Part) -> dict[str, Any]:
    match part:
        case Said(text):
            return {"content": text}
        case Called(_, _, name):
            return {"function_call": {"name": name, "arguments": ""}}
        case Argued(_, text):
            return {"function_call": {"arguments": text}}
