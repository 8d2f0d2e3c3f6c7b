"""What several commands share: their options, a connection, how they print and how they fail."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from swaplora_server.printable import printable

if TYPE_CHECKING:
    from swaplora_server.client import Card, Client

WIDE = 1000  # characters: more than any table needs
LOCAL = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option("--url", envvar="SWAPLORA_URL", help="The server to talk to.")]
Key = Annotated[
    str | None,
    typer.Option("--api-key", envvar="SWAPLORA_API_KEY", help="Its API key, if it wants one; the first of K1,K2,…"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Name = Annotated[str, typer.Argument(help="The adapter's name.")]
VersionedName = Annotated[str, typer.Argument(help="The adapter's name, or one version of it: sql@2.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens of an answer (default: the server's, 256).")]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends answers.")]


def say(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Print what may hold words of others: of a server, a model or a file."""
    typer.echo(printable(text), err=err, nl=nl)


def cell(text: str) -> Text:
    """Words of others in a table."""
    return Text(printable(text))


def fail(*lines: str, code: int = 1) -> NoReturn:
    """End the command with one line on stderr for each thing wrong."""
    for line in lines:
        say(f"swaplora: {' '.join(line.splitlines())}", err=True)
    raise typer.Exit(code)


def show_json(value: object) -> None:
    """Print what a script reads."""
    typer.echo(json.dumps(value, indent=2))


def show_table(table: Table, notes: Iterable[str] = ()) -> None:
    """Print a table, and a line below it for each note. A row is folded only where a terminal is too narrow for it."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDE
    console.print(table)
    for note in notes:
        console.print(cell(note), soft_wrap=True)


@contextmanager
def connected(url: str, api_key: str | None) -> "Iterator[Client]":
    """A client whose failures, and those of the files it is given, end the command with one line.

    Of several keys with commas between, as SWAPLORA_API_KEY gives them to a server, it sends the first.
    """
    from swaplora_server.client import Client, ClientError

    try:
        with Client(url, api_key and api_key.split(",")[0].strip(), retries=0) as client:
            yield client
    except ClientError as error:
        fail(str(error))
    except UnicodeError:
        fail("a name or a text that was given is not valid UTF-8: type it again")
    except OSError as error:
        fail(f"cannot read {error.filename}: {error.strerror}")


def adapter_files(folder: Path, or_else: str = "") -> tuple[Path, Path]:
    """The config and the weights in a folder; ends the command if one is missing, with `or_else` as another remedy."""
    files = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in files:
        if not file.is_file():
            fail(f"{folder} has no {file.name}: give the folder that PEFT's save_pretrained wrote{or_else}")
    return files


def short_digest(card: "Card") -> str:
    """The start of a card's digest, enough to tell versions apart."""
    return str(card.get("digest", "-")).removeprefix("sha256:")[:12]
