"""What the ingress reads of a request to say where it is best answered. It refuses nothing: that is the replica's."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import from_json

from swaplora_adapters.errors import AdapterNotFoundError
from swaplora_adapters.files.naming import DEFAULT_TENANT, MAX_SAID_CHARS
from swaplora_adapters.registry.naming import Naming
from swaplora_server.cluster.affinity import RouteKey
from swaplora_server.http.transport.json_limits import check_limits
from swaplora_server.service.errors import RequestError

ANYWHERE = RouteKey((), "")
MAX_NAMES = 64  # that are looked at; a request may name no more than it may sum
_BEGINNING_CHARACTERS = 256
_MAX_DEPTH = 4
_MAX_NUMBER = 12  # characters
_PATH = re.compile(r"/v1/(?:adapters|aliases|mixtures|models)/(?P<name>[^/]+)")
_VERSION = re.compile(r"[@:].*", re.DOTALL)
_PINNED = re.compile(r"@(?:[1-9][0-9]{0,8}|sha256:[0-9a-f]{12})")  # of a digest the beginning that is always there
_BEGIN = ("system", "instructions", "messages", "prompt", "input", "text", "inputs", "query")


def key_of_body(raw: bytes | bytearray, tenant: str, base_id: str, adapter: str | None = None) -> RouteKey:
    """Of a JSON body that names who answers; of anything else ANYWHERE. `tenant` is the caller's, by its own name.

    `adapter` is one that is named beside the body.
    """
    try:
        check_limits(raw)
        body = from_json(raw)
    except (RequestError, ValueError):
        return ANYWHERE
    if not isinstance(body, Mapping):
        return ANYWHERE
    told = (*([adapter] if adapter else ()), *_named(body))
    names = [name.removeprefix("base:").removeprefix(f"{base_id}:") for name in told]
    stored = _stored([name for name in names if name != base_id], tenant)
    return RouteKey((*stored, *_numbered(body)), _session(body))


def key_of_path(path: str, tenant: str) -> RouteKey:
    """Of what is asked about an adapter."""
    match = _PATH.match(path)
    return ANYWHERE if match is None else RouteKey(_stored([match["name"]], tenant), "")


def _named(body: Mapping[str, Any]) -> Iterator[str]:
    """As `NamingBody` has it, as far as these fields are what they should be."""
    terms, paths = body.get("adapters"), body.get("lora_path")
    found = [body.get("model"), body.get("adapter_id")]
    found += [term.get("name") for term in terms if isinstance(term, Mapping)] if isinstance(terms, list) else []
    found += paths if isinstance(paths, list) else [paths]
    return (name for name in found[:MAX_NAMES] if isinstance(name, str) and name)


def _numbered(body: Mapping[str, Any]) -> Iterator[str]:
    """llama.cpp's adapters by number, which replicas alone can tell: each stands for itself, and no name is like it."""
    terms = body.get("lora")
    for term in terms[:MAX_NAMES] if isinstance(terms, list) else ():
        if isinstance(term, Mapping) and isinstance(term.get("id"), int) and term.get("scale") != 0:
            yield f"#{term['id']}"[:_MAX_NUMBER]


def _stored(names: list[str], tenant: str) -> tuple[str, ...]:
    naming = Naming("" if tenant == DEFAULT_TENANT else tenant)
    try:
        stored = {name: naming.key(_VERSION.sub("", name)) for name in names}
    except AdapterNotFoundError:
        return ()
    found = [
        key + _version(name) for name, key in stored.items() if len(key) <= MAX_SAID_CHARS
    ]  # routers remember them
    return tuple(dict.fromkeys(found))


def _version(name: str) -> str:
    """What pins a name to a version; `''` where nothing does."""
    match = _PINNED.search(name)
    return "" if match is None else match[0]


def _session(body: Mapping[str, Any]) -> str:
    """The same for requests whose prompts begin alike, and share a salt."""
    beginning = next((text for field in _BEGIN if (text := _text(body.get(field)))), "")
    if not beginning:
        return ""
    salt = body.get("cache_salt")
    told = f"{salt if isinstance(salt, str) else ''}\0{beginning}"
    return hashlib.sha256(told.encode(errors="surrogatepass")).hexdigest()[:16]


def _text(value: Any, depth: int = 0) -> str:
    """What a prompt begins with, in any form that prompts have."""
    if isinstance(value, str):
        return value[:_BEGINNING_CHARACTERS]
    if depth == _MAX_DEPTH or not value:
        return ""
    if isinstance(value, list):
        is_tokens = isinstance(value[0], int)
        return repr(value[:_BEGINNING_CHARACTERS]) if is_tokens else _text(value[0], depth + 1)
    if isinstance(value, Mapping):
        return _text(value.get("content") or value.get("text"), depth + 1)
    return ""
