"""Cards and aliases as the contract writes them."""

import json
from typing import Any

from swaplora_adapters.registry.card import Card
from swaplora_adapters.store.records import Alias
from swaplora_server.http.described import NUMBER, OBJECTS, TEXT, object_of
from swaplora_server.service.service import Service

CARD = object_of(object=TEXT, name=TEXT, version=NUMBER, digest=TEXT, base=TEXT, state=TEXT, versions=OBJECTS)


def card_body(service: Service, card: Card) -> dict[str, Any]:
    """A card; `base` is this server's, the shapes having been checked against it."""
    record = card.record
    return {
        "object": "adapter",
        "name": record.name,
        "version": record.version,
        "digest": record.digest,
        "base": service.settings.base_id,
        "kind": list(record.kinds),
        "rank": record.rank,
        "targets": list(record.targets),
        "parameters": record.num_parameters,
        "bytes": record.nbytes,
        "created": record.created,
        "state": card.state,
        "tier": card.tier,
        "reason": card.reason,
        "pinned": card.is_pinned,
        "in_flight": card.num_in_flight,
        "last_used": card.last_used,
        "last_failure": card.last_failure and card.last_failure._asdict(),
        "source": record.source,
        "provenance": record.provenance and json.loads(record.provenance),
        "warnings": list(record.warnings),
        "shared_with": None if card.shared_with is None else list(card.shared_with),
        "versions": [
            {"version": version.version, "digest": version.digest, "created": version.created, "bytes": version.nbytes}
            for version in card.versions
        ],
    }


def alias_body(alias: Alias) -> dict[str, Any]:
    """An alias with all of its targets; a single one has the whole weight, whatever its number."""
    targets = [{"target": target.reference, "weight": target.weight} for target in alias.targets]
    return {"object": "alias", "alias": alias.alias, "targets": targets}
