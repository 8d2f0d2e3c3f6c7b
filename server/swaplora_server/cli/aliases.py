"""`swaplora aliases list`, `set`, `delete`: names that stand for versions of adapters."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table

from swaplora_server.cli.common import LOCAL, AsJson, Key, Url, cell, connected, fail, say, show_json, show_table

WEIGHT = re.compile(r"[0-9]{1,9}")

Alias = Annotated[str, typer.Argument(help="The alias.")]


def list_aliases(url: Url = LOCAL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Show every alias of the server."""
    with connected(url, api_key) as client:
        aliases = client.aliases()
    if as_json:
        show_json(aliases)
        return
    table = Table("alias", "targets", "canary", box=None)
    for alias in aliases:
        table.add_row(cell(alias["alias"]), cell(_targets(alias)), cell(_canary(alias)))
    show_table(table)


def set_alias(
    alias: Alias,
    target: Annotated[
        list[str], typer.Argument(metavar="TARGET[=WEIGHT]", help="Who answers: sql@2, or sql@2=90 sql@3=10.")
    ],
    canary: Annotated[
        str | None,
        typer.Option(help="A version among them that gets no more requests once too many of its have failed."),
    ] = None,
    max_error_rate: Annotated[float, typer.Option(help="The share of failures that is not too many.")] = 0.05,
    url: Url = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Let an alias stand for one target, or share its requests among several by weight."""
    body = _body(target)
    if canary is not None:
        body["canary"] = {"target": canary, "max_error_rate": max_error_rate}
    with connected(url, api_key) as client:
        content = client.set_alias(alias, body)
    if as_json:
        show_json(content)
    else:
        say(f"{alias} stands for {_targets(content)}")


def _body(targets: list[str]) -> dict[str, Any]:
    if len(targets) == 1 and "=" not in targets[0]:
        return {"target": targets[0]}
    return {"targets": [_weighted(target) for target in targets]}


def _weighted(text: str) -> dict[str, Any]:
    target, _, weight = text.rpartition("=")
    if not (target and WEIGHT.fullmatch(weight)):
        fail(f"{text} has no weight: give each of several targets a whole number, such as sql@2=90 sql@3=10", code=2)
    return {"target": target, "weight": int(weight)}


def _targets(alias: Mapping[str, Any]) -> str:
    """A single target by itself, several with their weights, as `set` takes them."""
    targets = alias["targets"]
    if len(targets) == 1:
        return str(targets[0]["target"])
    return " ".join(f"{target['target']}={target['weight']}" for target in targets)


def _canary(alias: Mapping[str, Any]) -> str:
    """Which version it is, and whether it still gets requests."""
    canary = alias.get("canary")
    if canary is None:
        return "-"
    target, since = canary["target"], canary.get("stepped_back")
    return str(target) if since is None else f"{target} stepped back: {canary['reason']}"


def delete_alias(alias: Alias, url: Url = LOCAL, api_key: Key = None) -> None:
    """Delete an alias. What it stood for stays."""
    with connected(url, api_key) as client:
        client.delete_alias(alias)
    say(f"{alias} is deleted")
