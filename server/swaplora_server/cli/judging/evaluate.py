"""`swaplora evaluate`: how well adapters and versions of them do a task, with intervals, and whether they differ."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from swaplora_server.cli.common import (
    LOCAL,
    AsJson,
    Key,
    MaxTokens,
    Stop,
    Url,
    cell,
    connected,
    fail,
    say,
    show_json,
    show_table,
)

if TYPE_CHECKING:
    from swaplora_server.client import Client

INTERRUPTED = 130  # as a shell has it


def evaluate(
    task: Annotated[Path, typer.Argument(metavar="TASK.jsonl", help="A line of JSON for each thing to ask.")],
    models: Annotated[list[str], typer.Option("--model", help="Who is asked: the base, sql or sql@2; once for each.")],
    max_tokens: MaxTokens = None,
    stop: Stop = None,
    url: Url = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Ask a task of several models at once, behind all other requests of the server, and compare them.

    Ended by Ctrl-C, it is cancelled, and the server keeps what has come.
    """
    with connected(url, api_key) as client:
        found = _run(client, read_task(task), models, max_tokens, stop or [])
    if as_json:
        show_json(found)
    else:
        show_table(_results(found))
        if found["comparisons"]:
            show_table(_comparisons(found), [f"{found['id']}, task {found['task']['digest'][:19]}"])
    if found["state"] != "done":
        reason = f": {found['error']['message']}" if found["error"] else ""
        fail(f"the evaluation {found['id']} was not done but {found['state']}{reason}")


def read_task(path: Path) -> str:
    """A task file's text; ends the command for one that is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 (byte {error.start}): write it as JSON lines in UTF-8")


def _run(client: "Client", task: str, models: list[str], max_tokens: int | None, stop: list[str]) -> Mapping[str, Any]:
    begun = client.begin_evaluation(task, models, max_tokens=max_tokens, stop=stop)
    try:
        with _bar(begun["progress"]["total"]) as advance:
            return client.wait_for_evaluation(begun["id"], lambda told: advance(told["progress"]["done"]))
    except KeyboardInterrupt:
        client.cancel_evaluation(begun["id"])
        say(f"swaplora: {begun['id']} is cancelled; the server keeps what has come", err=True)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _bar(total: int) -> "Iterator[Any]":
    """What is to be called with how many are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=total)
        yield lambda done: progress.update(bar, completed=done)


def _results(found: Mapping[str, Any]) -> Table:
    table = Table("model", "version", "metric", "items", "mean", "95 %", box=None)
    for result in found["results"]:
        version = "-" if result["version"] is None else str(result["version"])
        for name, metric in result["metrics"].items():
            between = f"{metric['low']:.3f} to {metric['high']:.3f}"
            table.add_row(cell(result["model"]), version, name, str(metric["num"]), f"{metric['mean']:.3f}", between)
    return table


def _comparisons(found: Mapping[str, Any]) -> Table:
    """Of each two, how many items only one of them got right."""
    table = Table("first", "second", "items", "only first", "only second", "p", box=None)
    for pair in found["comparisons"]:
        first, second = map(cell, pair["models"])
        counts = (str(pair[name]) for name in ("num", "only_first", "only_second"))
        table.add_row(first, second, *counts, f"{pair['p_value']:.2g}")
    return table
