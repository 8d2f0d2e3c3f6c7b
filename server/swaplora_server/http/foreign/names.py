"""Who answers, by whichever field says so: `model` and `adapters`, or those of other servers.

Each means what `model` or `adapters` mean here, or is refused: where one is left unread, the base would answer.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache

from swaplora_server.http.foreign.fields import ID_BITS, MAX_TERMS, NamingBody, ScaledId
from swaplora_server.service.adapter_mix import MixTerm
from swaplora_server.service.errors import RequestError
from swaplora_server.service.service import Service


@lru_cache(maxsize=1 << 16)
def id_of(name: str) -> int:
    """The number by which llama.cpp's clients name an adapter: its name decides it alone, in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) >> (32 - ID_BITS)


def terms_of(service: Service, body: NamingBody) -> tuple[MixTerm, ...]:
    """What is added to the base, whichever field says so; nothing where `model` alone says who answers.

    Raises RequestError for fields that say different things, and for ids that are nobody's.
    """
    own = tuple(
        MixTerm(term.name, term.scale, f"adapters[{number}].name") for number, term in enumerate(body.adapters or ())
    )
    is_base = not body.model or service.is_base(body.model)
    said = [("adapters", own)] if is_base else [("model", (MixTerm(body.model),))]
    said = [(param, terms) for param, terms in said if terms]
    for param, terms in _others(service, body):
        if said and _meaning(service, said[0][1]) != _meaning(service, terms):
            message = f"{param} and {said[0][0]} say different things of who answers: send one of them"
            raise RequestError("invalid_request", message, param)
        said.append((param, terms))
    return said[0][1] if is_base and said else own


def names_of(service: Service, ids: Sequence[ScaledId], param: str) -> list[str]:
    """The adapters that have these ids. Raises RequestError for one that is nobody's, twice there, or two adapters'."""
    named: dict[int, list[str]] = defaultdict(list)
    for versions in service.registry.names.index.all():
        named[id_of(versions.current.name)].append(versions.current.name)
    found: list[str] = []
    for number, one in enumerate(ids):
        path, names = f"{param}[{number}].id", named.get(one.id, [])
        if not names:
            message = f"there is no adapter with the id {one.id}; GET /lora-adapters lists them"
            raise RequestError("model_not_found", message, path)
        if len(names) > 1:
            raise RequestError("invalid_request", f"two adapters have the id {one.id}: name one in model", path)
        if names[0] in found:
            raise RequestError("invalid_request", f"{path}: {one.id} is given twice", path)
        found.append(names[0])
    return found


def _others(service: Service, body: NamingBody) -> Iterator[tuple[str, tuple[MixTerm, ...]]]:
    """Each field of other servers that says something, and what. All scales 0 say that it is the base."""
    for param, name in (("lora_path", _one_name(body)), ("adapter_id", body.adapter_id)):
        if name:
            yield param, (MixTerm(name, 1.0, param),)
    if body.lora:
        yield "lora", _by_ids(service, body.lora)


def _one_name(body: NamingBody) -> str | None:
    """Of a list for several prompts the name that all of them have."""
    if not isinstance(body.lora_path, list):
        return body.lora_path
    if len(body.lora_path) != body.num_prompts:
        message = f"lora_path has {len(body.lora_path)} names for {body.num_prompts} prompts"
        raise RequestError("invalid_request", message, "lora_path")
    names = {name or None for name in body.lora_path}
    if len(names) > 1:
        message = (
            "lora_path: one request is answered by one adapter: send a request for each, and they run in one batch"
        )
        raise RequestError("unsupported_field", message, "lora_path")
    return names.pop()


def _by_ids(service: Service, ids: Sequence[ScaledId]) -> tuple[MixTerm, ...]:
    terms = tuple(
        MixTerm(name, one.scale, f"lora[{number}].id")
        for number, (name, one) in enumerate(zip(names_of(service, ids, "lora"), ids, strict=True))
        if one.scale
    )
    if len(terms) > MAX_TERMS:
        raise RequestError("invalid_request", f"lora: a sum has at most {MAX_TERMS} terms", "lora")
    return terms


def _meaning(service: Service, terms: Sequence[MixTerm]) -> list[tuple[str, float]]:
    return [(service.reference(term.name).removeprefix("base:"), term.scale) for term in terms]
