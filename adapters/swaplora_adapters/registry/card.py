"""What is told of an adapter and of an upload. Plain data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from swaplora_adapters.store.records import VersionRecord

# where its weights are: where steps read them, in the host's memory to be copied from there, or in its files alone
Tier = Literal["device", "host", "disk"]


class Failure(NamedTuple):
    """What went wrong with the last attempt to replace an adapter; it serves as before."""

    at: float  # seconds since the epoch
    reason: str


@dataclass(frozen=True, slots=True)
class Card:
    """What is known of an adapter, as of now."""

    record: VersionRecord
    versions: Sequence[VersionRecord]
    state: str
    reason: str | None
    tier: Tier
    is_pinned: bool
    num_in_flight: int | None  # None where whoever looks is not to know
    last_used: float | None
    last_failure: Failure | None
    shared_with: tuple[str, ...] | None  # None for whom it is shared with
    is_gated: bool | None = False  # likewise


class AdapterState(NamedTuple):
    """Where one adapter is, as of now."""

    name: str
    num_bytes: int  # that it takes in memory
    tier: Tier
    is_loading: bool  # or waits for memory
    is_pinned: bool


class PutResult(NamedTuple):
    """An upload's outcome."""

    card: Card
    record: VersionRecord  # what was put: the current version, but where there is a gate
    is_first: bool  # of its name
