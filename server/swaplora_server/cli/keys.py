"""`swaplora keys create`, `list`, `revoke`: the file that a server's `--key-file` names."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from swaplora_adapters.files.naming import DEFAULT_TENANT
from swaplora_server.access.caller import KeyScope
from swaplora_server.cli.common import AsJson, cell, fail, say, show_json, show_table

File = Annotated[
    Path, typer.Option("--key-file", envvar="SWAPLORA_KEY_FILE", help="The file that the server's --key-file names.")
]


def create_key(
    key_file: File,
    tenant: Annotated[str, typer.Option(help="Whose it is.")] = DEFAULT_TENANT,
    scope: Annotated[
        list[KeyScope] | None, typer.Option(help="What it is for; repeatable (default generate and adapters:read).")
    ] = None,
    days: Annotated[int | None, typer.Option(min=1, max=36500, help="How long it is good (default: always).")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key, and print it, once. A server that runs takes it within a second or two."""
    from pydantic import ValidationError

    from swaplora_server.access.key_file import KeyFileError, create_key

    expires = None if days is None else datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
    scopes = tuple(dict.fromkeys(scope or (KeyScope.GENERATE, KeyScope.READ)))
    try:
        key, stored = create_key(key_file, tenant, scopes, expires)
    except KeyFileError as error:
        fail(str(error))
    except ValidationError:
        fail(f"{tenant} is no tenant: 1 to 63 lower-case letters, digits and dashes, the first no dash", code=2)
    if as_json:
        show_json({"key": key, **_shown(stored)})
    else:
        say(key)
        say(f"{stored.id} of {tenant} for {' '.join(scopes)}: keep the key, which is stored nowhere", err=True)


def list_keys(key_file: File, as_json: AsJson = False) -> None:
    """Show every key of the file, without the keys themselves."""
    from swaplora_server.access.key_file import KeyFileError, read_keys

    try:
        keys = [_shown(key) for key in read_keys(key_file).keys]
    except KeyFileError as error:
        fail(str(error))
    if as_json:
        show_json(keys)
        return
    table = Table("id", "tenant", "scopes", "expires", box=None)
    for key in keys:
        table.add_row(*map(cell, (key["id"], key["tenant"], " ".join(key["scopes"]), key.get("expires", "never"))))
    show_table(table)


def revoke_key(
    key_file: File, key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id, as list shows it.")]
) -> None:
    """Take a key out of the file. A server that runs refuses it within a second or two."""
    from swaplora_server.access.key_file import KeyFileError, revoke_key

    try:
        revoke_key(key_file, key_id)
    except KeyFileError as error:
        fail(str(error))
    say(f"{key_id} is revoked")


def _shown(key: Any) -> dict[str, Any]:
    shown: dict[str, Any] = key.model_dump(mode="json", exclude_none=True, exclude={"sha256"})
    return {name: value for name, value in shown.items() if value != {}}
