"""Log lines that only the server begins: no text of a client's ends a line, or moves a terminal's cursor."""

import io
import logging
import sys
from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import Any, TextIO

import structlog
from structlog.dev import plain_traceback
from structlog.typing import ExcInfo

_INDENT = "    "  # of what follows a line's first: no line of ours begins so
_notes: ContextVar[dict[str, Any]] = ContextVar("notes")


def begin_notes() -> dict[str, Any]:
    """What the one line about a request will say, empty yet; `notes` is the same to all that runs for it."""
    notes: dict[str, Any] = {}
    _notes.set(notes)
    return notes


def notes() -> dict[str, Any]:
    """Of the request that this runs for, to be added to. Never a prompt or an answer. Nobody's outside of one."""
    return _notes.get({})


def visible(text: str) -> str:
    """`text` with escapes for what cannot be seen: control characters, line separators, marks of direction."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def show_values(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor."""
    return {name: visible(value) if isinstance(value, str) else value for name, value in event.items()}


def indented_traceback(out: TextIO, exc_info: ExcInfo) -> None:
    """A traceback without local variables, which may hold prompts, for structlog's console."""
    text = io.StringIO()
    plain_traceback(text, exc_info)
    out.write("\n" + _INDENT + _in_lines(text.getvalue().strip("\n")))


class LineFormatter(logging.Formatter):
    """What libraries log, and tracebacks with it."""

    def format(self, record: logging.LogRecord) -> str:
        return _in_lines(super().format(record))


def _in_lines(text: str) -> str:
    return f"\n{_INDENT}".join(map(visible, text.split("\n")))


def configure_logging(least: str, *, as_json: bool) -> None:
    """Log lines on stderr, for people or as JSON; what libraries log goes through the same lines."""
    level = logging.getLevelNamesMapping()[least.upper()]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        show_values,
    ]
    plain = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=indented_traceback)
    json_lines = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[*shared, *(json_lines if as_json else [plain])],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    library_lines = logging.StreamHandler()
    library_lines.setFormatter(LineFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[library_lines])
