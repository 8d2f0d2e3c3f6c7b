"""`swaplora adapters pin`, `unpin`, `warm`, `rollback`, `share`: what changes of a stored adapter without an upload."""

from typing import TYPE_CHECKING, Annotated

import typer

from swaplora_server.cli.common import (
    LOCAL,
    AsJson,
    Key,
    Name,
    Url,
    VersionedName,
    connected,
    fail,
    say,
    short_digest,
    show_json,
)

if TYPE_CHECKING:
    from swaplora_server.client import Card


def pin(name: Name, url: Url = LOCAL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Keep an adapter in memory, whatever else needs the room."""
    with connected(url, api_key) as client:
        card = client.pin_adapter(name, pinned=True)
    _show(card, f"{name} is pinned", as_json)


def unpin(name: Name, url: Url = LOCAL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Let an adapter leave memory for others again."""
    with connected(url, api_key) as client:
        card = client.pin_adapter(name, pinned=False)
    _show(card, f"{name} is no longer pinned", as_json)


def share(
    name: Name,
    tenants: Annotated[list[str] | None, typer.Argument(help="Who may ask it from now on, and no others.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Everybody may.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Nobody else may.")] = False,
    url: Url = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Let other tenants ask an adapter, as OWNER~NAME. It stays yours: they cannot change, copy or inspect it."""
    if bool(tenants) + public + private != 1:
        fail("say with whom: tenants, --public or --private", code=2)
    with connected(url, api_key) as client:
        card = client.share_adapter(name, ["*"] if public else tenants or [])
    whom = "everybody" if public else ", ".join(tenants or ["nobody"])
    _show(card, f"{name} is shared with {whom}", as_json)


def warm(name: VersionedName, url: Url = LOCAL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Load an adapter into memory now. Its first request need not wait then."""
    with connected(url, api_key) as client:
        card = client.warm_adapter(name)
    _show(card, f"{name} is in memory", as_json)


def roll_back(
    name: Name,
    to: Annotated[int | None, typer.Option(help="The version to go to (default: the one before).")] = None,
    url: Url = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Go back to an earlier version of an adapter. Requests that run keep the version they began with."""
    with connected(url, api_key) as client:
        card = client.set_current(name, _version_before(client.adapter(name)) if to is None else to)
    _show(card, f"{name} stands for {name}@{card.get('version')} now ({short_digest(card)})", as_json)


def _version_before(card: "Card") -> int:
    """The highest version below the current one, of those that its gate lets; ends the command if there is none."""
    current = card["version"]
    passed = [version for version in card["versions"] if version.get("standing") in (None, "passed")]
    earlier = [version["version"] for version in passed if version["version"] < current]
    if not earlier:
        fail(f"{card['name']} has no version before {current}: choose another with --to, or upload the old one again")
    return int(max(earlier))


def _show(card: "Card", line: str, as_json: bool) -> None:
    if as_json:
        show_json(card)
    else:
        say(line)
