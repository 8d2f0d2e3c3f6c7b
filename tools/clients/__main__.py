"""`make clients`: what other people's clients make of a server, and the table of it in docs/clients.md.

A server of the embedded base and the demo adapters is started as the README does it, but for float32. Each client runs
in an environment of its own and asks it for everything that it can, of the base and of every adapter, through a
wiretap. Names of clients as arguments run those alone.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import httpx
from rich.console import Console

from environments import CLIENTS, Client
from evaluation import judge_evaluation
from judge import FAILED, FEATURES, NONE, NOT_RUN, Cell, WrongError, judge_answer, judge_feature
from page import Row, write_page
from repository import ROOT
from server_process import process
from swaplora_server.config import Settings
from swaplora_server.embedded import SMOLLM2, ensure_embedded_base
from wiretap import Wiretap, tapped

BASE, ADAPTERS = SMOLLM2.folder_name, ("sql", "json", "intent")
FLAGS = ("--adapter-dir", str(ROOT / "demo"), "--dtype", "fp32")
console = Console(soft_wrap=True, highlight=False)


class Script:
    """A client at work in a process of its own."""

    def __init__(self, running: subprocess.Popen[str]) -> None:
        self._running = running
        self.lacks: Mapping[str, str | None] = self._read()

    def ask(self, feature: str, model: str) -> Mapping[str, Any]:
        """What the client tells: `told`, or `error`."""
        asked: IO[str] = self._running.stdin  # type: ignore[assignment]
        asked.write(json.dumps({"feature": feature, "model": model}) + "\n")
        asked.flush()
        told: Mapping[str, Any] = self._read()
        return told

    def _read(self) -> Any:
        line = self._running.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise WrongError("the script ended; its log is beside its environment")
        return json.loads(line)


@contextmanager
def running(client: Client, url: str) -> Iterator[Script]:
    """The client's script, until it has been asked everything."""
    with client.log.open("w") as log:
        started = subprocess.Popen(
            client.command(url), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            yield Script(started)
        finally:
            started.communicate()


def row_of(client: Client, tap: Wiretap, server: httpx.Client) -> Row:
    """Everything that a client can do, done."""
    if client.lacks:
        return Row(client, dict.fromkeys(FEATURES, Cell(NOT_RUN, f"without {client.lacks}")))
    client.prepare()
    judge = judge_evaluation if client.name == "lm-eval" else judge_answer
    with running(client, tap.url) as script:
        return Row(client, {feature: cell_of(feature, script, tap, partial(judge, server)) for feature in FEATURES})


def cell_of(feature: str, script: Script, tap: Wiretap, judge: Callable[..., Any]) -> Cell:
    """One feature, asked of everyone."""
    if (lack := script.lacks.get(feature, "not of this client")) is not None:
        return Cell(NONE, lack)
    answers = {}
    for model in (BASE, *ADAPTERS):
        try:
            answers[model] = judge(feature, model, script.ask(feature, model), *tap.take())
        except WrongError as error:
            return Cell(FAILED, f"{model}: {error}")
    return judge_feature(answers, BASE)


def main() -> int:
    """How many cells failed, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="of clients; all of them if there are none")
    names = parser.parse_args().names
    base = ensure_embedded_base(Settings().cache_dir, console.print)
    rows = []
    with ExitStack() as stack:
        data_dir = stack.enter_context(tempfile.TemporaryDirectory())
        _, server = stack.enter_context(process(base, Path(data_dir), *FLAGS))
        tap = stack.enter_context(tapped(server.base_url.port or 0))
        for client in CLIENTS:
            if not names or client.name in names:
                rows.append(row_of(client, tap, server))
                console.print(rows[-1].told)
                write_page(rows[-1:])
    return int(any(cell.word == FAILED for row in rows for cell in row.cells.values()))


if __name__ == "__main__":
    sys.exit(main())
