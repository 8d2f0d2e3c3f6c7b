"""`swaplora adapters inspect`: what an adapter does to each module, in numbers."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from swaplora_server.cli.common import (
    LOCAL,
    AsJson,
    Key,
    Url,
    VersionedName,
    cell,
    connected,
    say,
    short_digest,
    show_json,
    show_table,
)

SHOWN_SINGULAR_VALUES = 4
NUMBERS = {
    "rank": "rank",
    "norm": "norm",
    "relative_norm": "of the base's",
    "spectral_norm": "spectral norm",
    "effective_rank": "effective rank",
    "cosine": "cosine",
    "intruders": "intruders",
}


def inspect(
    name: VersionedName,
    against: Annotated[str | None, typer.Option(help="Another adapter: how much both point the same way.")] = None,
    intruders: Annotated[bool, typer.Option("--intruders", help="Count directions new to the base. Slow.")] = False,
    url: Url = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show how much an adapter changes each module. Norms and singular values are those of B A."""
    with connected(url, api_key) as client:
        inspection = client.inspect_adapter(name, against=against, intruders=intruders)
    if as_json:
        show_json(inspection)
        return
    say(f"{inspection['name']}@{inspection['version']} ({short_digest(inspection)})")
    if other := inspection.get("against"):
        say(f"cosine with {other['name']}@{other['version']}: {_number(other['cosine'])}")
    show_table(_table(inspection["modules"]), [f"warning: {warning}" for warning in inspection["warnings"]])


def _table(modules: Sequence[Mapping[str, Any]]) -> Table:
    shown = [key for key in NUMBERS if any(key in module for module in modules)]
    numbers = [Column(NUMBERS[key], justify="right") for key in shown]
    table = Table(Column("module", overflow="fold"), *numbers, "singular values", box=None)
    for module in modules:
        values = [_number(module.get(key)) for key in shown]
        table.add_row(cell(module["module"]), *values, _largest(module["singular_values"]))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else _short(value)


def _short(number: float) -> str:
    return f"{number:.3g}"


def _largest(values: Sequence[float]) -> str:
    more = " …" if len(values) > SHOWN_SINGULAR_VALUES else ""
    return " ".join(map(_short, values[:SHOWN_SINGULAR_VALUES])) + more
