"""One hostile upload and the answer that it must get, and the ways to make one from a sound adapter."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from damage import NAME, Damage, Files, both, form, part, put

Answer = tuple[int | None, str | None]
INVALID: Answer = (422, "invalid_adapter")
UNSUPPORTED: Answer = (422, "unsupported_adapter")
TOO_LARGE: Answer = (413, "adapter_too_large")
CREATED: Answer = (201, None)
MALFORMED: Answer = (400, "invalid_request")
BAD_NAME: Answer = (400, "invalid_adapter_name")
NONE: Answer = (None, None)  # the client is gone before it could be answered


@dataclass(frozen=True)
class Hostile:
    """One upload. `wire` makes what the client sends, and `word` is what the answer's message must hold.

    Where the request itself is well formed, `files` makes the two files in it.
    """

    name: str
    wire: Callable[[Files], bytes]
    answer: Answer
    word: str = ""
    adapter: str = NAME
    files: Callable[[Files], Files] | None = None


def _of_files(name: str, files: Callable[[Files], Files], answer: Answer, word: str) -> Hostile:
    return Hostile(name, lambda sound: put(both(files(sound))), answer, word, files=files)


def weights(name: str, damage: bytes | Damage, word: str = "", answer: Answer = INVALID) -> Hostile:
    """A sound config beside a weights file that is given, or spoilt."""
    spoil = damage if callable(damage) else lambda _: damage
    return _of_files(name, lambda sound: sound._replace(weights=spoil(sound.weights)), answer, word)


def config(name: str, raw: bytes, word: str = "", answer: Answer = INVALID) -> Hostile:
    """A config's bytes beside sound weights."""
    return _of_files(name, lambda sound: sound._replace(config=raw), answer, word)


def fields(name: str, word: str = "", answer: Answer = INVALID, **changed: Any) -> Hostile:
    """Sound weights, and the sound config with some fields changed."""

    def files(sound: Files) -> Files:
        return sound._replace(config=json.dumps(json.loads(sound.config) | changed).encode())

    return _of_files(name, files, answer, word)


def named(name: str, url: str, answer: Answer = BAD_NAME, adapter: str = NAME) -> Hostile:
    """A sound upload to a name that is given as it stands in the URL."""
    return Hostile(name, lambda sound: put(both(sound), url=f"/v1/adapters/{url}"), answer, adapter=adapter)


def disposition(name: str, parameters: str, answer: Answer = MALFORMED) -> Hostile:
    """A sound upload whose first part names itself by these parameters."""

    def wire(sound: Files) -> bytes:
        first = (f"Content-Disposition: form-data; {parameters}", sound.config)
        return put(form(first, part("weights", sound.weights)))

    return Hostile(name, wire, answer)


def typed(name: str, kind: str, answer: Answer = MALFORMED) -> Hostile:
    """A sound upload under a content type that is given."""
    return Hostile(name, lambda sound: put(both(sound), kind=kind), answer)
