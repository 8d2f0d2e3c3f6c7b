"""`swaplora chat`: a conversation on the terminal."""

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from swaplora_server.cli.common import LOCAL, Key, Url, connected, say
from swaplora_server.printable import printable

if TYPE_CHECKING:
    from swaplora_server.client import Client, Conversation

CHAT_COMMANDS = "/model NAME, /models, /reset, /quit"


def chat(
    model: Annotated[str | None, typer.Argument(help="Who answers: an adapter, or the base (default).")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Say this, print the answer, end.")] = None,
    url: Url = LOCAL,
    api_key: Key = None,
) -> None:
    """Talk to a model. Text on standard input is taken as one message."""
    from swaplora_server.client import Conversation

    with connected(url, api_key) as client:
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
        say(piece, nl=False)
    say()


def _converse(client: "Client", conversation: "Conversation") -> None:
    """Take turns until the person leaves. A refused turn is shown, and the conversation goes on without it."""
    from swaplora_server.client import ClientError

    with suppress(ImportError):
        import readline  # noqa: F401  # gives input() its line editing
    say(f"Talking to {conversation.model}. {CHAT_COMMANDS}")
    while (line := _read_line(printable(f"{conversation.model}> "))) not in (None, "/quit"):
        try:
            _take_turn(client, conversation, line)
        except ClientError as error:
            say(f"swaplora: {error}", err=True)
        except KeyboardInterrupt:
            say(" (stopped)")


def _read_line(prompt: str) -> str | None:
    """What the person types, or None when there is no more."""
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        say()
        return None


def _take_turn(client: "Client", conversation: "Conversation", line: str) -> None:
    match line.split(maxsplit=1):
        case []:
            pass
        case ["/model", name]:
            conversation.model = name
        case ["/models"]:
            say("\n".join(str(model["id"]) for model in client.models()))
        case ["/reset"]:
            conversation.reset()
        case [word, *_] if word.startswith("/"):
            say(f"The commands are {CHAT_COMMANDS}")
        case _:
            _answer(conversation, line)
