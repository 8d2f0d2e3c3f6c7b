"""`swaplora gate set`, `show`, `remove`, `swaplora promote`: what new versions must show, and which one is current."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from swaplora_server.cli.common import (
    LOCAL,
    AsJson,
    Key,
    MaxTokens,
    Name,
    Stop,
    Url,
    cell,
    connected,
    fail,
    say,
    short_digest,
    show_json,
    show_table,
)
from swaplora_server.cli.judging.evaluate import read_task


def set_gate(
    name: Name,
    task: Annotated[Path, typer.Option(metavar="TASK.jsonl", help="What a new version must be good at.")],
    min_score: Annotated[float, typer.Option(help="The least share of it that must be right, from 0 to 1.")],
    must_keep: Annotated[
        Path | None, typer.Option(metavar="TASK.jsonl", help="What it must not be worse at than the current version.")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="By how much it may be worse at that all the same, from 0 to 1.")
    ] = None,
    max_tokens: MaxTokens = None,
    stop: Stop = None,
    url: Url = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Have each new version of an adapter be judged by the server before the name stands for it."""
    if (must_keep is None) != (max_drop is None):
        fail("--must-keep and --max-drop go together: what must be kept, and how far", code=2)
    with connected(url, api_key) as client:
        kept = None if must_keep is None or max_drop is None else (read_task(must_keep), max_drop)
        gate = client.set_gate(name, read_task(task), min_score, must_keep=kept, max_tokens=max_tokens, stop=stop or [])
    if as_json:
        show_json(gate)
    else:
        say(f"new versions of {name} are current once they have passed; {name}@{gate['current']} is now")


def show_gate(name: Name, url: Url = LOCAL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Show what new versions of an adapter must reach, and what each has."""
    with connected(url, api_key) as client:
        gate = client.gate(name)
    if as_json:
        show_json(gate)
        return
    table = Table("version", "standing", "bar", "score", "95 %", "current's", "wanted", "met", box=None)
    for version in gate["versions"]:
        for row in _rows(gate, version):
            table.add_row(*map(cell, row))
    reasons = [
        f"{name}@{version['version']}: {version['verdict']['reason']}"
        for version in gate["versions"]
        if version["verdict"] and version["verdict"]["reason"]
    ]
    show_table(table, [*_asked(gate), *reasons])


def remove_gate(name: Name, url: Url = LOCAL, api_key: Key = None) -> None:
    """Have each new version of an adapter be current at once again."""
    with connected(url, api_key) as client:
        client.remove_gate(name)
    say(f"new versions of {name} are current at once")


def promote(
    name: Name,
    version: Annotated[int | None, typer.Argument(help="Which version (default: the newest).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Though it has not passed the gate.")] = False,
    url: Url = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Let an adapter's name stand for a version that has passed its gate. Requests that run keep the one they have."""
    with connected(url, api_key) as client:
        wanted = version or max(each["version"] for each in client.adapter(name)["versions"])
        card = client.set_current(name, wanted, force=force)
    if as_json:
        show_json(card)
    else:
        say(f"{name} stands for {name}@{card['version']} now ({short_digest(card)})")


def _rows(gate: Mapping[str, Any], version: Mapping[str, Any]) -> Iterator[list[str]]:
    number = f"{version['version']}{' (current)' if version['version'] == gate['current'] else ''}"
    begins = [number, version["standing"] or "-"]
    bars = version["verdict"]["bars"] if version["verdict"] else []
    for bar in bars:
        score, current = bar["score"], bar["current_score"]
        between = f"{score['low']:.3f} to {score['high']:.3f}"
        met = "yes" if bar["is_met"] else f"missed by {bar['missed_by']:.3f}"
        means = f"{score['mean']:.3f}", between, "-" if current is None else f"{current['mean']:.3f}"
        yield [*begins, bar["bar"], *means, f"{bar['wanted']:.3f}", met]
    if not bars:
        yield [*begins, *("-" for _ in range(6))]


def _asked(gate: Mapping[str, Any]) -> Iterator[str]:
    task, kept = gate["task"], gate["must_keep"]
    yield f"min_score {gate['min_score']:.3f} of {task['num_items']} items, task {task['digest'][:19]}"
    if kept:
        yield f"max_drop {kept['max_drop']:.3f} of {kept['num_items']} items, task {kept['digest'][:19]}"
