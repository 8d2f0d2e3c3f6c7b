"""The `swaplora` command: start a server, manage the adapters of one that runs, talk to it, measure it.

Nothing slow is imported before a command needs it: `--help` must answer at once.
"""

import sys
from collections.abc import Callable, Mapping

import typer

from swaplora_server.cli import (
    adapters,
    aliases,
    bench,
    chat,
    compose,
    doctor,
    inspect,
    keys,
    mixtures,
    serve,
    update,
)
from swaplora_server.cli.judging import evaluate, gates
from swaplora_server.cli.offline import extract, merge, train, validate
from swaplora_server.cli.settings import PLAIN_HELP, SettingsCommand

TAKE_SETTINGS = (serve.serve, merge.merge, extract.extract, doctor.doctor, validate.validate)
CLASSES = dict.fromkeys(TAKE_SETTINGS, SettingsCommand) | {train.train: train.TrainCommand}


def main() -> None:
    """Run the command line."""
    app(args=serve.spread_values(sys.argv[1:]))


def _group(description: str, commands: Mapping[str, Callable[..., None]]) -> typer.Typer:
    group = typer.Typer(
        help=description,
        no_args_is_help=True,
        **PLAIN_HELP,
    )
    for name, command in commands.items():
        group.command(name, cls=CLASSES.get(command))(command)
    return group


app = _group(
    "One frozen base model, any number of LoRA adapters, one batch, over HTTP.",
    {
        "serve": serve.serve,
        "chat": chat.chat,
        "bench": bench.bench,
        "train": train.train,
        "evaluate": evaluate.evaluate,
        "promote": gates.promote,
        "merge": merge.merge,
        "extract": extract.extract,
        "doctor": doctor.doctor,
    },
)
app.add_typer(
    _group(
        "Manage the adapters of a running server.",
        {
            "list": adapters.list_adapters,
            "get": adapters.get_adapter,
            "put": adapters.put_adapter,
            "delete": adapters.delete_adapter,
            "rollback": update.roll_back,
            "pin": update.pin,
            "unpin": update.unpin,
            "warm": update.warm,
            "share": update.share,
            "inspect": inspect.inspect,
            "compose": compose.compose,
            "validate": validate.validate,
        },
    ),
    name="adapters",
)
app.add_typer(
    _group(
        "Have new versions of adapters be judged before they are current.",
        {"set": gates.set_gate, "show": gates.show_gate, "remove": gates.remove_gate},
    ),
    name="gate",
)
app.add_typer(
    _group(
        "Manage the aliases of a running server: names that stand for other versions, or share requests among several.",
        {"list": aliases.list_aliases, "set": aliases.set_alias, "delete": aliases.delete_alias},
    ),
    name="aliases",
)
app.add_typer(
    _group(
        "Manage the mixtures of a running server: adapters under one name, among which every token chooses.",
        {
            "list": mixtures.list_mixtures,
            "create": mixtures.create_mixture,
            "delete": mixtures.delete_mixture,
            "trace": mixtures.trace_mixture,
        },
    ),
    name="mixtures",
)
app.add_typer(
    _group(
        "Manage the keys in the file of a server's --key-file.",
        {"create": keys.create_key, "list": keys.list_keys, "revoke": keys.revoke_key},
    ),
    name="keys",
)
