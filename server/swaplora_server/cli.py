"""The `swaplora` command: start a server, manage the adapters of one that runs, talk to it.

Nothing slow is imported before a command needs it: `--help` must answer at once.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from swaplora_server.banner import human_bytes

if TYPE_CHECKING:
    from swaplora_server.client import Card, Client, Conversation
    from swaplora_server.config import Settings

ADAPTER_FLAGS = ("--adapter", "--lora-modules")
LIMITS_OF_OTHERS = ("max_loras", "max_cpu_loras", "max_lora_rank")
LOCAL = "http://127.0.0.1:8000"
CHAT_COMMANDS = "/model NAME, /models, /reset, /quit"

app = typer.Typer(
    help="One frozen base model, any number of LoRA adapters, one batch, over HTTP.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: rich's panels alone take a third of the half second that it may take
    pretty_exceptions_enable=False,
)
adapters = typer.Typer(help="Manage the adapters of a running server.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(adapters, name="adapters")

Url = Annotated[str, typer.Option("--url", envvar="SWAPLORA_URL", help="The server to talk to.")]
Key = Annotated[str | None, typer.Option("--api-key", envvar="SWAPLORA_API_KEY", help="Its API key, if it wants one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Name = Annotated[str, typer.Argument(help="The adapter's name.")]


def main() -> None:
    """Run the command line."""
    app(args=spread_values(sys.argv[1:]))


def spread_values(args: Sequence[str]) -> list[str]:
    """`--lora-modules a=x b=y`, several values after one flag as other servers take them, with the flag before each."""
    spread: list[str] = []
    for arg in args:
        is_adapter = "=" in arg or arg.startswith("{")
        if is_adapter and not arg.startswith("-") and len(spread) > 1 and spread[-2] in ADAPTER_FLAGS:
            spread.append(spread[-2])
        spread.append(arg)
    return spread


@app.command()
def serve(
    ctx: typer.Context,
    base: Annotated[str | None, typer.Argument(help="embedded (default), a local folder, or a hub id.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="What requests call the base.")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"] | None, typer.Option(help="Where the model runs.")] = None,
    dtype: Annotated[Literal["auto", "bf16", "fp32"] | None, typer.Option(help="Number format of the base.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest context in tokens (default: the base's).")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (default 127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 picks a free one (default 8000).")] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="A key that admits a request; repeatable.")
    ] = None,
    insecure_no_auth: Annotated[
        bool | None, typer.Option("--insecure-no-auth", help="Listen beyond this machine without a key.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(*ADAPTER_FLAGS, metavar="NAME=PATH", help="An adapter folder; repeatable.")
    ] = None,
    adapter_dir: Annotated[Path | None, typer.Option(help="Folder whose sub-folders are adapters.")] = None,
    adapter_memory_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for resident adapters (default 4GiB).")
    ] = None,
    max_adapter_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest adapter to accept (default 1GiB).")
    ] = None,
    keep_versions: Annotated[int | None, typer.Option(help="Versions kept of each adapter (default 8).")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Most requests running at once (default 64).")] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Most requests waiting; then 429 (default 256).")] = None,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option("--max-batch-tokens", "--max-num-batched-tokens", help="Most tokens in one step (default 512)."),
    ] = None,
    kv_cache_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for the KV cache (default 1GiB).")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens in a block of the KV cache (default 16).")] = None,
    max_body_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest JSON body (default 32MiB).")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings, named as the flags.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Uploaded adapters.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Downloads and compiled code.")] = None,
    drain_seconds: Annotated[float | None, typer.Option(help="Time to end requests at shutdown (default 30).")] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None, typer.Option(help="Least level logged (default info).")
    ] = None,
    log_json: Annotated[bool | None, typer.Option("--log-json", help="Log one JSON object a line.")] = None,
    model: Annotated[str | None, typer.Option(help="Same as BASE.")] = None,
    enable_lora: Annotated[bool | None, typer.Option("--enable-lora", help="Accepted; always on here.")] = None,
    max_loras: Annotated[int | None, typer.Option(help="Accepted; no such limit here.")] = None,
    max_cpu_loras: Annotated[int | None, typer.Option(help="Accepted; no such limit here.")] = None,
    max_lora_rank: Annotated[int | None, typer.Option(help="Accepted; no such limit here.")] = None,
) -> None:
    """Serve a base model and its adapters.

    Each flag is also an environment variable (SWAPLORA_PORT) and a key of the --config file (port); flags win.
    """
    given = {name: value for name, value in ctx.params.items() if value not in (None, [], ())}
    settings = _settings(_in_our_terms(given))
    # OpenMP's runtime reads this when torch loads it: threads that wait spin briefly, then leave their core to HTTP
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    from swaplora_server.serve import StartError, run

    try:
        run(settings)
    except StartError as error:
        _fail(str(error))


def _in_our_terms(given: dict[str, Any]) -> dict[str, Any]:
    """The flags as settings, with those of other servers translated or, where nothing corresponds, remarked on."""
    for name in LIMITS_OF_OTHERS:
        if given.pop(name, None) is not None:
            flag = name.replace("_", "-")
            typer.echo(f"swaplora: --{flag} is ignored: only --adapter-memory-bytes limits adapters", err=True)
    given.pop("enable_lora", None)
    base = given.pop("model", None)
    if base is not None and given.setdefault("base", base) != base:
        _fail("BASE and --model name different models: give one of them", code=2)
    if "adapter" in given:
        given["adapter"] = tuple(map(_name_and_path, given["adapter"]))
    return given


def _name_and_path(value: str) -> str:
    """NAME=PATH, also from the JSON object that other servers take."""
    if not value.startswith("{"):
        return value
    try:
        module = json.loads(value)
        return f"{module['name']}={module['path']}"
    except (ValueError, KeyError):
        _fail(f'--lora-modules: {value} is neither NAME=PATH nor {{"name": …, "path": …}}', code=2)


def _settings(flags: dict[str, Any]) -> "Settings":
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from swaplora_server.config import Settings, complaints

    try:
        return Settings(**flags)
    except ValidationError as error:
        _fail(*complaints(error), code=2)
    except SettingsError as error:
        _fail(str(error), code=2)


def _fail(*lines: str, code: int = 1) -> NoReturn:
    for line in lines:
        typer.echo(f"swaplora: {line}", err=True)
    raise typer.Exit(code)


@contextmanager
def _connected(url: str, api_key: str | None) -> "Iterator[Client]":
    """A client whose failures, and those of the files it is given, end the command with one line."""
    from swaplora_server.client import Client, ClientError

    try:
        with Client(url, api_key) as client:
            yield client
    except ClientError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"cannot read {error.filename}: {error.strerror}")


@adapters.command("list")
def list_adapters(url: Url = LOCAL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Show every adapter of the server."""
    with _connected(url, api_key) as client:
        cards = client.adapters()
    if as_json:
        typer.echo(json.dumps(cards, indent=2))
        return
    table = Table("name", "version", "state", "rank", "size", "running", "digest", box=None)
    for card in cards:
        table.add_row(*map(Text, _row(card)))
    Console().print(table)


def _row(card: "Card") -> list[str]:
    shown = [str(card.get(key, "-")) for key in ("name", "version", "state", "rank")]
    return [*shown, human_bytes(card.get("bytes", 0)), str(card.get("in_flight", "-")), _short(card)]


def _short(card: "Card") -> str:
    return str(card.get("digest", "-")).removeprefix("sha256:")[:12]


@adapters.command("get")
def get_adapter(name: Name, url: Url = LOCAL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Show one adapter."""
    with _connected(url, api_key) as client:
        card = client.adapter(name)
    if as_json:
        typer.echo(json.dumps(card, indent=2))
        return
    table = Table.grid(padding=(0, 2))
    for key, value in card.items():
        table.add_row(key, Text(human_bytes(value) if key == "bytes" else _plain(value)))
    Console().print(table)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@adapters.command("put")
def put_adapter(
    name: Name,
    folder: Annotated[Path, typer.Argument(help="A folder as PEFT saves it.")],
    create_only: Annotated[bool, typer.Option("--create-only", help="Refuse if the name is taken.")] = False,
    if_match: Annotated[str | None, typer.Option(help="Replace only the version with this digest.")] = None,
    url: Url = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter, or a new version of one. Requests that run keep the version they began with."""
    from rich.progress import open as open_with_bar

    config, weights = _adapter_files(folder)
    console = Console(stderr=True)
    bar = open_with_bar(
        weights,
        "rb",
        description=f"uploading {name}",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with _connected(url, api_key) as client, config.open("rb") as config_file, bar as weights_file:
        card = client.put_adapter(name, config_file, weights_file, create_only=create_only, if_match=if_match)
    typer.echo(json.dumps(card, indent=2) if as_json else f"{name}@{card.get('version')} is stored ({_short(card)})")


def _adapter_files(folder: Path) -> tuple[Path, Path]:
    files = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in files:
        if not file.is_file():
            _fail(f"{folder} has no {file.name}: give the folder that PEFT's save_pretrained wrote")
    return files


@adapters.command("delete")
def delete_adapter(
    name: Name,
    version: Annotated[int | None, typer.Option(help="Delete this version only.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds to wait for its memory to be free.")] = None,
    url: Url = LOCAL,
    api_key: Key = None,
) -> None:
    """Delete an adapter. Requests that run end on it; new ones no longer find it."""
    with _connected(url, api_key) as client:
        is_free = client.delete_adapter(name, version=version, timeout=timeout)
    what = name if version is None else f"{name}@{version}"
    typer.echo(f"{what} is deleted" if is_free else f"{what} is deleted; requests that began before still run on it")


@app.command()
def chat(
    model: Annotated[str | None, typer.Argument(help="Who answers: an adapter, or the base (default).")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Say this, print the answer, end.")] = None,
    url: Url = LOCAL,
    api_key: Key = None,
) -> None:
    """Talk to a model. Text on standard input is taken as one message."""
    from swaplora_server.client import Conversation

    with _connected(url, api_key) as client:
        conversation = Conversation(client, model or _base_id(client))
        if message is None and sys.stdin.isatty():
            _converse(client, conversation)
        else:
            _answer(conversation, sys.stdin.read() if message is None else message)


def _base_id(client: "Client") -> str:
    from swaplora_server.client import ClientError

    for model in client.models():
        if model.get("parent") is None:
            return str(model["id"])
    raise ClientError("the server lists no base model: name the MODEL to talk to")


def _answer(conversation: "Conversation", text: str) -> None:
    for piece in conversation.say(text):
        typer.echo(piece, nl=False)
    typer.echo()


def _converse(client: "Client", conversation: "Conversation") -> None:
    """Take turns until the person leaves. A refused turn is shown, and the conversation goes on without it."""
    from swaplora_server.client import ClientError

    with suppress(ImportError):
        import readline  # noqa: F401  # gives input() its line editing
    typer.echo(f"Talking to {conversation.model}. {CHAT_COMMANDS}")
    while (line := _read_line(f"{conversation.model}> ")) not in (None, "/quit"):
        try:
            _take_turn(client, conversation, line)
        except ClientError as error:
            typer.echo(f"swaplora: {error}", err=True)
        except KeyboardInterrupt:
            typer.echo(" (stopped)")


def _read_line(prompt: str) -> str | None:
    """What the person types, or None when there is no more."""
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        typer.echo()
        return None


def _take_turn(client: "Client", conversation: "Conversation", line: str) -> None:
    match line.split(maxsplit=1):
        case []:
            pass
        case ["/model", name]:
            conversation.model = name
        case ["/models"]:
            typer.echo("\n".join(str(model["id"]) for model in client.models()))
        case ["/reset"]:
            conversation.reset()
        case [word, *_] if word.startswith("/"):
            typer.echo(f"The commands are {CHAT_COMMANDS}")
        case _:
            _answer(conversation, line)
