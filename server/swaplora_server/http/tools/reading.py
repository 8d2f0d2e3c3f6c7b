"""How the texts of one request are to be read, and what they keep to so that they can be."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from swaplora_server.http.tools.wire import ToolUse
from swaplora_server.service.errors import RequestError
from swaplora_server.service.generating.task import GenerationTask
from swaplora_server.service.generation import Generation
from swaplora_server.service.tools.dialect import Dialect, TextReader


@dataclass(frozen=True, slots=True)
class Reading:
    """Of texts of one base, which may call so much."""

    dialect: Dialect
    use: ToolUse | None
    may_think: bool  # what is held to a format, or to calls, has no room for reasoning

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to be read out of a text."""
        return self.use is None and not (self.may_think and self.dialect.thoughts)

    def new_reader(self, generation: Generation) -> Callable[[], TextReader]:
        """For each of its texts one."""
        prompt_end = generation.prompt_end(0)

        def reader() -> TextReader:
            calls = None if self.use is None else self.use.reader(self.dialect.calls)
            return self.dialect.reader(prompt_end, calls, may_think=self.may_think)

        return reader


def as_read(task: GenerationTask, dialect: Dialect, use: ToolUse | None) -> tuple[GenerationTask, Reading]:
    """`task`, held to calls where it must be, and how to read it. Raises RequestError where it has a format too."""
    of_calls = None if use is None else use.source(dialect.calls)
    if task.format is not None and of_calls is not None:
        told = task.format.param
        words = f"{told} and {of_calls.param} exclude each other where calls are strict, required or named"
        raise RequestError("invalid_request", words, told)
    reading = Reading(dialect, use, task.format is None and not (use is not None and use.is_held))
    shown = frozenset() if reading.is_plain else dialect.shown
    return replace(task, format=task.format or of_calls, shown=shown), reading
