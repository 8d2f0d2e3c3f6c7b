"""What a person sees while the server starts, and once it is up."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.panel import Panel
from rich.status import Status
from rich.table import Table
from rich.text import Text

from swaplora_server.printable import printable

MAX_NAMES = 12


def human_bytes(count: float) -> str:
    """A number of bytes for a person to read: `512 B`, `1.5 MiB`, `4 GiB`."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{count:.1f}".removesuffix(".0") + f" {units[0]}"


def show_banner(
    console: Console,
    *,
    url: str,
    page: str | None,
    base: str,
    device: str,
    kernels: str,
    memory: Sequence[tuple[str, int]],
    adapters: Sequence[str],
    seconds: float,
) -> None:
    """Print where the server listens and what it serves.

    `page` is the address for a browser, if there is one; `memory` is (what for, bytes); `seconds` the start took.
    """
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim")
    rows.add_column(overflow="fold")
    rows.add_row("URL", Text(url, style="bold"))
    if page is not None:
        rows.add_row("page", Text(page, style="bold"))
    rows.add_row("base", Text(printable(f"{base} ({device}, {kernels})")))
    rows.add_row("memory", Text(" · ".join(f"{purpose} {human_bytes(size)}" for purpose, size in memory)))
    rows.add_row("adapters", Text(printable(_names(adapters))))
    console.print(Panel(rows, title="swaplora", subtitle=f"ready in {seconds:.1f} s", expand=False))


def _names(adapters: Sequence[str]) -> str:
    if not adapters:
        return "none yet: swaplora adapters put NAME FOLDER"
    more = len(adapters) - MAX_NAMES
    return ", ".join(adapters[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


class Progress:
    """The steps of a start, on stderr: a spinner beside the one that runs, or on no terminal a line as each begins.

    A context manager, and `step` has the form of any callback that takes a line of text.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._spinner: Status | None = None
        self._message = ""
        self._started = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(done=error is None)

    def step(self, message: str) -> None:
        """End the step that runs, if any, and begin the next."""
        self._end(done=True)
        message = printable(message)
        self._message, self._started = message, time.monotonic()
        if self._console.is_terminal:
            self._spinner = self._console.status(Text(message))
            self._spinner.start()
        else:
            self._console.print(Text(message), soft_wrap=True)

    def _end(self, *, done: bool) -> None:
        if self._spinner is None:
            return
        self._spinner.stop()
        self._spinner = None
        seconds = time.monotonic() - self._started
        self._console.print(Text(f"{'✓' if done else '✗'} {self._message} ({seconds:.1f} s)"), soft_wrap=True)
