"""`swaplora adapters inspect`: what an adapter does to each module, in numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.table import Column, Table
from rich.text import Text

from swaplora_server.cli.common import (
    LOCAL,
    AsJson,
    Key,
    Url,
    VersionedName,
    connected,
    short_digest,
    show_json,
    show_table,
)

SHOWN_SINGULAR_VALUES = 4


def inspect(name: VersionedName, url: Url = LOCAL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Show how much an adapter changes each module. Norms and singular values are those of B A."""
    with connected(url, api_key) as client:
        inspection = client.inspect_adapter(name)
    if as_json:
        show_json(inspection)
        return
    typer.echo(f"{inspection['name']}@{inspection['version']} ({short_digest(inspection)})")
    show_table(_table(inspection["modules"]), [f"warning: {warning}" for warning in inspection["warnings"]])


def _table(modules: Sequence[Mapping[str, Any]]) -> Table:
    numbers = [Column(title, justify="right") for title in ("rank", "norm", "spectral norm", "effective rank")]
    table = Table(Column("module", overflow="fold"), *numbers, "singular values", box=None)
    for module in modules:
        sizes = [_short(module[key]) for key in ("norm", "spectral_norm", "effective_rank")]
        table.add_row(Text(module["module"]), str(module["rank"]), *sizes, _largest(module["singular_values"]))
    return table


def _short(number: float) -> str:
    return f"{number:.3g}"


def _largest(values: Sequence[float]) -> str:
    more = " …" if len(values) > SHOWN_SINGULAR_VALUES else ""
    return " ".join(map(_short, values[:SHOWN_SINGULAR_VALUES])) + more
