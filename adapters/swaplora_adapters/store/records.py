"""What is kept of a stored adapter besides its files. Plain data: no tensors, no SQL."""

import enum
import json
from dataclasses import dataclass
from typing import NamedTuple

PUT_BACK = "put back: what the name stands for was put again while this one was not judged yet"


class Standing(enum.StrEnum):
    """What has become of a version that came under its name's gate."""

    CANDIDATE = "candidate"  # not judged yet
    PASSED = "passed"
    FAILED = "failed"
    FORCED = "forced"  # made current all the same


@dataclass(frozen=True, slots=True)
class Details:
    """What inspecting an adapter's files found out, and how they came to be."""

    digest: str
    rank: int  # the largest of any module
    targets: tuple[str, ...]  # distinct last names of modules, sorted
    base_model: str | None
    num_parameters: int  # in memory
    warnings: tuple[str, ...]
    provenance: str | None = None  # a JSON object, for what was made here of other adapters or of another kind
    kinds: tuple[str, ...] = ("lora",)  # and what it is besides, or instead


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One immutable version under a name; versions count from 1 and are never used twice."""

    name: str
    version: int
    digest: str
    rank: int
    targets: tuple[str, ...]
    base_model: str | None
    num_parameters: int
    nbytes: int  # of both files
    created: float  # seconds since the epoch
    source: str
    warnings: tuple[str, ...]
    failure: str | None  # why its files cannot be used
    provenance: str | None = None  # as in Details
    kinds: tuple[str, ...] = ("lora",)
    standing: Standing | None = None  # None for one that came where there was no gate
    verdict: str | None = None  # a JSON object with a `reason`, once it is judged

    @property
    def has_passed(self) -> bool:
        """Whether a gate lets it be what its name stands for; what came without one has been that already."""
        return self.standing in (None, Standing.PASSED)

    @property
    def is_put_back(self) -> bool:
        """Whether the current version was put again before this one was judged, which then counts as withdrawn."""
        return self.standing is Standing.FAILED and json.loads(self.verdict or "{}").get("reason") == PUT_BACK


class Target(NamedTuple):
    """Where an alias leads (a name, `name@2` or `name@sha256:…`), and with how much of the traffic."""

    reference: str
    weight: int


class Mixing(NamedTuple):
    """How a mixture chooses among its members for each token: see `weights.router`."""

    top_k: int
    temperature: float


class Canary(NamedTuple):
    """A target that gets no more requests once more than a share of the last ones failed by the server's fault."""

    target: str  # a version, as the alias has it
    max_error_rate: float
    min_requests: int  # of the window, before anything is concluded
    window_seconds: float
    stepped_back: float | None = None  # when, in seconds since the epoch
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Alias:
    """A name that stands for others; with several targets it splits what is asked of it by their weights.

    With `mixing` it is a mixture, and they are its members, which all answer together.
    """

    alias: str
    targets: tuple[Target, ...]
    mixing: Mixing | None = None
    canary: Canary | None = None


class Published(NamedTuple):
    """The outcome of a publish: `is_new` is false when the version that `record` is already was these bytes."""

    record: VersionRecord
    is_new: bool
    previous: VersionRecord | None  # the current version before


class Quarantined(NamedTuple):
    """A version whose files were found unusable."""

    name: str
    version: int
    reason: str


class Touched(NamedTuple):
    """What other servers have changed."""

    names: frozenset[str] = frozenset()
    aliases: frozenset[str] = frozenset()
