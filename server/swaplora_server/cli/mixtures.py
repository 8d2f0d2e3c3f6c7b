"""`swaplora mixtures list`, `create`, `delete`, `trace`: adapters under one name, among which every token chooses."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table

from swaplora_server.cli.common import LOCAL, AsJson, Key, Url, cell, connected, say, show_json, show_table

Name = Annotated[str, typer.Argument(help="The mixture.")]


def list_mixtures(url: Url = LOCAL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Show every mixture of the server."""
    with connected(url, api_key) as client:
        mixtures = client.mixtures()
    if as_json:
        show_json(mixtures)
        return
    table = Table("mixture", "members", "top_k", "temperature", box=None)
    for each in mixtures:
        chosen = [str(each["top_k"]), f"{each['temperature']:g}"]
        table.add_row(cell(each["name"]), cell(" ".join(each["members"])), *chosen)
    show_table(table)


def create_mixture(
    name: Name,
    members: Annotated[list[str], typer.Argument(metavar="MEMBER...", help="Adapters, or versions such as sql@2.")],
    top_k: Annotated[int, typer.Option(help="How many of them a token takes.")] = 1,
    temperature: Annotated[float, typer.Option(help="The larger, the more alike are the shares of those.")] = 1.0,
    url: Url = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Make a mixture of adapters, or change one."""
    with connected(url, api_key) as client:
        content = client.put_mixture(name, members, top_k, temperature=temperature)
    if as_json:
        show_json(content)
    else:
        say(f"{name} mixes {' '.join(content['members'])}")


def delete_mixture(name: Name, url: Url = LOCAL, api_key: Key = None) -> None:
    """Delete a mixture. Its members stay."""
    with connected(url, api_key) as client:
        client.delete_mixture(name)
    say(f"{name} is deleted")


def trace_mixture(
    name: Name,
    prompt: Annotated[str, typer.Argument(help="A text, of no more than 256 tokens.")],
    url: Url = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show how much of each member a prompt's tokens take, layer by layer; with --json every token at every module."""
    with connected(url, api_key) as client:
        trace = client.trace_mixture(name, prompt)
    if as_json:
        show_json(trace)
        return
    table = Table("layer", box=None)
    for member in trace["members"]:
        table.add_column(cell(member))
    for layer, shares in _by_layer(trace).items():
        table.add_row(layer, *(f"{share:.0%}" for share in shares))
    show_table(table)


def _by_layer(trace: Mapping[str, Any]) -> dict[str, list[float]]:
    """The mean of each member's shares over a layer's tokens and modules; modules outside of one by their names."""
    sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0] * len(trace["members"]))
    counts: defaultdict[str, int] = defaultdict(int)
    for module in trace["modules"]:
        where = module["module"] if module["layer"] is None else str(module["layer"])
        for members, shares in zip(module["members"], module["shares"], strict=True):
            counts[where] += 1
            for member, share in zip(members, shares, strict=True):
                sums[where][member] += share
    return {where: [total / counts[where] for total in totals] for where, totals in sums.items()}
