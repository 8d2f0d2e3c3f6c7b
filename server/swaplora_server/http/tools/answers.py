"""A text's parts as OpenAI's objects: calls and reasoning in a chat's message, and in the deltas of its stream."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from swaplora_server.http.tools.wire import ToolUse
from swaplora_server.service.tools.dialect import TextReader
from swaplora_server.service.tools.reader import Argued, Called, Part, Said, Thought


class ChatAnswers:
    """What becomes of the choices of one chat that may call tools, or reason."""

    def __init__(self, use: ToolUse | None, new_reader: Callable[[], TextReader], *, tells_thoughts: bool) -> None:
        self._use = use
        self._new_reader = new_reader
        self._tells_thoughts = tells_thoughts
        self._is_legacy = use is not None and use.is_legacy
        self._readers: defaultdict[int, TextReader] = defaultdict(new_reader)  # of the choices that are streamed
        self._num_calls: defaultdict[int, int] = defaultdict(int)

    def message(self, text: str, finish_reason: str | None) -> tuple[dict[str, Any], str | None]:
        """An assistant's message of the whole text, and why it ended."""
        reader = self._new_reader()
        parts = [*reader.push(text), *reader.flush()]
        said = "".join(part.text for part in parts if isinstance(part, Said))
        thought = "".join(part.text for part in parts if isinstance(part, Thought))
        calls = _calls(parts)
        message: dict[str, Any] = {"role": "assistant", "content": said or (None if calls else "")}
        if thought and self._tells_thoughts:
            message |= _reasoning(thought)
        if calls:
            message |= {"function_call": calls[0]["function"]} if self._is_legacy else {"tool_calls": calls}
        return message, self._reason(finish_reason, len(calls))

    def deltas(self, choice: int, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        """Those of so much more text of a choice."""
        reader = self._readers[choice]
        parts = [*reader.push(text), *(reader.flush() if is_last else ())]
        self._num_calls[choice] += sum(isinstance(part, Called) for part in parts)
        told = [part for part in parts if self._tells_thoughts or not isinstance(part, Thought)]
        return [_legacy_delta(part) if self._is_legacy else _delta(part) for part in told]

    def finish_reason(self, choice: int, reason: str | None) -> str | None:
        """Of a choice all of whose text has come."""
        return self._reason(reason, self._num_calls[choice])

    def _reason(self, reason: str | None, num_calls: int) -> str | None:
        return reason if self._use is None else self._use.finish_reason(reason, num_calls)


def _reasoning(text: str) -> dict[str, Any]:
    """Under the name that most clients read, and the one that newer ones do."""
    return {"reasoning_content": text, "reasoning": text}


def _calls(parts: Sequence[Part]) -> list[dict[str, Any]]:
    arguments: defaultdict[int, str] = defaultdict(str)
    for part in parts:
        if isinstance(part, Argued):
            arguments[part.number] += part.text
    return [
        {"id": part.call_id, "type": "function", "function": {"name": part.name, "arguments": arguments[part.number]}}
        for part in parts
        if isinstance(part, Called)
    ]


def _delta(part: Part) -> dict[str, Any]:
    match part:
        case Said(text):
            return {"content": text}
        case Thought(text):
            return _reasoning(text)
        case Called(index, call_id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        case Argued(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _legacy_delta(part: Part) -> dict[str, Any]:
    match part:
        case Called(_, _, name):
            return {"function_call": {"name": name, "arguments": ""}}
        case Argued(_, text):
            return {"function_call": {"arguments": text}}
        case _:
            return _delta(part)
