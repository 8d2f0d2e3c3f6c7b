"""`swaplora adapters compose`: a new adapter made of stored ones."""

from typing import Annotated

import typer

from swaplora_server.cli.common import LOCAL, AsJson, Key, Name, Url, connected, fail, say, short_digest, show_json


def compose(
    name: Name,
    sources: Annotated[list[str], typer.Argument(help="What of: sql=1.0 polite=0.4 …", metavar="NAME=SCALE")],
    method: Annotated[str, typer.Option(help="sum (exact), svd, ties, dare_linear or dare_ties.")] = "sum",
    density: Annotated[float | None, typer.Option(help="Share of entries that ties and dare keep.")] = None,
    rank: Annotated[int | None, typer.Option(help="The most that a module keeps; not for sum.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of what dare drops.")] = None,
    materialise: Annotated[
        bool, typer.Option("--materialise", help="Serve it merged into weights of its own: as fast as the base.")
    ] = False,
    url: Url = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Make an adapter of stored ones. The same again makes no further version."""
    scales = _scales(sources)
    with connected(url, api_key) as client:
        card = client.compose_adapter(
            name, scales, method, density=density, rank=rank, seed=seed, materialise=materialise or None
        )
    if as_json:
        show_json(card)
    else:
        say(f"{name}@{card.get('version')} is stored ({short_digest(card)})")


def _scales(sources: list[str]) -> dict[str, float]:
    """Name → scale, which is 1 where none is given; ends the command for what is no number, or a name twice."""
    scales: dict[str, float] = {}
    for source in sources:
        name, _, scale = source.partition("=")
        if name in scales:
            fail(f"{name} is given twice: add up its scales", code=2)
        try:
            scales[name] = float(scale or 1)
        except ValueError:
            fail(f"{source}: {scale} is no number: write NAME=SCALE, as in sql=0.5", code=2)
    return scales
