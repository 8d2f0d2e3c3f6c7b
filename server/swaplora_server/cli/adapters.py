"""`swaplora adapters list`, `get`, `put`, `delete`: what a server has stored."""

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from swaplora_server.banner import human_bytes
from swaplora_server.cli.common import (
    LOCAL,
    AsJson,
    Key,
    Name,
    Url,
    adapter_files,
    cell,
    connected,
    say,
    short_digest,
    show_json,
    show_table,
)

if TYPE_CHECKING:
    from swaplora_server.client import Card, Client

TITLES = ("version", "state", "pinned", "rank", "size", "running", "digest")
SOURCES = ("hf://", "s3://", "file:")


def list_adapters(url: Url = LOCAL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Show every adapter of the server."""
    with connected(url, api_key) as client:
        cards = client.adapters()
    if as_json:
        show_json(cards)
        return
    table = Table(Column("name", overflow="fold"), *TITLES, box=None)
    for card in cards:
        table.add_row(*map(cell, _row(card)))
    failed = [card for card in cards if card.get("last_failure")]
    show_table(table, [f"{card['name']} failed at {_failure(card['last_failure'])}" for card in failed])


def _row(card: "Card") -> list[str]:
    shown = [str(card.get(key, "-")) for key in ("name", "version", "state")]
    pinned = "yes" if card.get("pinned") else "-"
    size, running = human_bytes(card.get("bytes", 0)), str(card.get("in_flight", "-"))
    return [*shown, pinned, str(card.get("rank", "-")), size, running, short_digest(card)]


def get_adapter(name: Name, url: Url = LOCAL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Show one adapter."""
    with connected(url, api_key) as client:
        card = client.adapter(name)
    if as_json:
        show_json(card)
        return
    table = Table.grid(padding=(0, 2))
    for key, value in card.items():
        table.add_row(cell(key), cell(_shown(key, value)))
    show_table(table)


def _shown(key: str, value: Any) -> str:
    if key == "bytes":
        return human_bytes(value)
    if key == "last_failure" and value is not None:
        return _failure(value)
    return value if isinstance(value, str) else json.dumps(value)


def _failure(failure: "Card") -> str:
    """When, in the time of whoever reads it, and why."""
    return f"{datetime.fromtimestamp(failure['at']).isoformat(' ', 'seconds')}: {failure['reason']}"


def put_adapter(
    name: Name,
    source: Annotated[str, typer.Argument(help="A folder as PEFT saves it, or hf://…, s3://… or file:…")],
    create_only: Annotated[bool, typer.Option("--create-only", help="Refuse if the name is taken.")] = False,
    if_match: Annotated[str | None, typer.Option(help="Replace only the version with this digest.")] = None,
    convert: Annotated[str | None, typer.Option(help="svd: have VeRA, LoHa, LoKr or FourierFT made into LoRA.")] = None,
    url: Url = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter, or a new version of one. Requests that run keep the version they began with.

    A folder is sent from here. What hf://, s3:// or file: names, the server fetches itself, if it is allowed to.
    """
    with connected(url, api_key) as client:
        if source.startswith(SOURCES):
            card = client.put_source(name, source, create_only=create_only, if_match=if_match, convert=convert)
        else:
            card = _upload(client, name, Path(source), create_only=create_only, if_match=if_match, convert=convert)
    if as_json:
        show_json(card)
    else:
        stored = card.get("stored", card)
        say(f"{name}@{stored.get('version')} is stored ({short_digest(stored)})")
        if stored.get("standing") == "candidate":
            say(f"{name} stands for {name}@{card['version']} until the new one has passed: swaplora gate show {name}")


def _upload(client: "Client", name: str, folder: Path, **how: Any) -> "Card":
    from rich.progress import open as open_with_bar

    config, weights = adapter_files(folder, f", or a source that begins with {', '.join(SOURCES)}")
    console = Console(stderr=True)
    bar = open_with_bar(
        weights,
        "rb",
        description=f"uploading {name}",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with config.open("rb") as config_file, bar as weights_file:
        return client.put_adapter(name, config_file, weights_file, **how)


def delete_adapter(
    name: Name,
    version: Annotated[int | None, typer.Option(help="Delete this version only.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds to wait for its memory to be free.")] = None,
    url: Url = LOCAL,
    api_key: Key = None,
) -> None:
    """Delete an adapter. Requests that run end on it; new ones no longer find it."""
    with connected(url, api_key) as client:
        is_free = client.delete_adapter(name, version=version, timeout=timeout)
    what = name if version is None else f"{name}@{version}"
    say(f"{what} is deleted" if is_free else f"{what} is deleted; requests that began before still run on it")
