"""Cards and aliases as the contract writes them."""

import json
from typing import Any

from swaplora_adapters.registry.card import Card, PutResult
from swaplora_adapters.store.records import Alias, VersionRecord
from swaplora_server.evaluation.results import SCORE
from swaplora_server.http.described import NUMBER, OBJECTS, TEXT, object_of
from swaplora_server.service.service import Service

MAX_SCORES = 16  # of one version, each of another task
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
        "gated": card.is_gated,
        "versions": [
            {**_stored(version), "created": version.created, "bytes": version.nbytes} for version in card.versions
        ],
    }


def put_body(service: Service, put: PutResult) -> dict[str, Any]:
    """The card, and as `stored` the version that was put: another than the current one where there is a gate."""
    return card_body(service, put.card) | {"stored": _stored(put.record)}


def whole_body(service: Service, card: Card) -> dict[str, Any]:
    """The card, with what its versions have shown: to its gate, and of each task what the last evaluation said."""
    told = card_body(service, card)
    asked = service.evaluations.last_of(service.tenant, [version.digest for version in card.versions])
    for shown, judged in zip(told["versions"], judged_versions(card), strict=True):
        shown["verdict"] = judged["verdict"]
        shown["scores"] = [
            {"task": task, "evaluation": one.id, "ended": one.ended, **score}
            for task, one in asked[shown["digest"]].items()
            for result in one.results or ()
            if result["digest"] == shown["digest"] and (score := result["metrics"].get(SCORE))
        ][:MAX_SCORES]
    return told


def judged_versions(card: Card) -> list[dict[str, Any]]:
    """Each version with its standing and its verdict."""
    return [{**_stored(each), "verdict": each.verdict and json.loads(each.verdict)} for each in card.versions]


def _stored(record: VersionRecord) -> dict[str, Any]:
    return {"version": record.version, "digest": record.digest, "standing": record.standing}


def alias_body(alias: Alias) -> dict[str, Any]:
    """An alias with all of its targets; a single one has the whole weight, whatever its number."""
    targets = [{"target": target.reference, "weight": target.weight} for target in alias.targets]
    canary = {} if alias.canary is None else {"canary": alias.canary._asdict()}
    return {"object": "alias", "alias": alias.alias, "targets": targets, **canary}
