"""What docs/api.md lists as refused, made from the server's own tables: `make tables` writes it."""

import json
from collections.abc import Mapping
from pathlib import Path

from swaplora_server.http.refusals import (
    ANTHROPIC,
    ANYWHERE,
    CHAT,
    COMPLETION,
    EMBEDDING,
    MESSAGE,
    POOLING,
    RESPONSE,
    SCORING,
    UNSERVED,
    Refusal,
)

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
BEGIN, END = "<!-- refused -->", "<!-- /refused -->"


def listed() -> str:
    """Each field with the values that ask for nothing, by where it stands; then the routes."""
    rows = {
        "completions and chats": _fields(ANYWHERE),
        "completions": _fields(_without(COMPLETION, ANYWHERE)),
        "chats": _fields(_without(CHAT, ANYWHERE)),
        "a message": _fields(MESSAGE),
        "`/v1/responses`, beside those of both": _fields(_without(RESPONSE, ANYWHERE)),
        "`/v1/messages`, beside those of both": _fields(_without(ANTHROPIC, ANYWHERE)),
        "`/v1/embeddings`": _fields(EMBEDDING),
        "`/pooling`, beside those": _fields(_without(POOLING, EMBEDDING)),
        "`/score` and `/rerank`": _fields(SCORING),
        "routes": ", ".join(f"`{path}`" for path in UNSERVED),
    }
    table = "".join(f"| {where} | {what} |\n" for where, what in rows.items())
    return f"| in | refused, unless it is null or what stands behind it |\n| --- | --- |\n{table}"


def in_page() -> str:
    """What stands there now."""
    return PAGE.read_text(encoding="utf-8").partition(f"{BEGIN}\n")[2].partition(END)[0]


def _without(refused: Mapping[str, Refusal], others: Mapping[str, Refusal]) -> dict[str, Refusal]:
    return {name: refusal for name, refusal in refused.items() if others.get(name) != refusal}


def _fields(refused: Mapping[str, Refusal]) -> str:
    return ", ".join(f"`{name}`{_neutral(refusal)}" for name, refusal in refused.items())


def _neutral(refusal: Refusal) -> str:
    values = [f"`{json.dumps(value)}`" for value in refusal.neutral]
    values += [f"as `{refusal.same_as}`"] if refusal.same_as else []
    return f" ({', '.join(values)})" if values else ""


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(in_page(), listed()), encoding="utf-8")
