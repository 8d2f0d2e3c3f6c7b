"""What is kept of an evaluation: plain data, which a restart reads again. No prompt and no answer is in it."""

import enum
import hashlib
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from swaplora_server.evaluation.results import comparisons, metrics_of
from swaplora_server.evaluation.task import Kind


class State(enum.StrEnum):
    """Where it stands; all but the first two are ends."""

    QUEUED = "queued"  # behind others of its tenant
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"  # the server ended first


class Version(BaseModel):
    """A version of an adapter, known by its bytes."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: int
    digest: str

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}"


class Mixture(BaseModel):
    """The versions that a mixture was of when it was bound, and how its tokens chose among them."""

    model_config = ConfigDict(frozen=True)

    members: list[Version]
    top_k: int
    temperature: float

    @property
    def digest(self) -> str:
        """Of all that it answers by, names aside."""
        parts = [[member.digest for member in self.members], self.top_k, self.temperature]
        return f"sha256:{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"


class Evaluated(BaseModel):
    """A model as it was asked for, and what this was bound to.

    The base has no name, version and digest, a mixture its members' in the place of name and version.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    name: str | None = None
    version: int | None = None
    digest: str | None = None
    mixture: Mixture | None = None

    @property
    def reference(self) -> str:
        """What it is asked by."""
        return self.model if self.name is None else f"{self.name}@{self.version}"

    @property
    def kept(self) -> Sequence[str]:
        """The versions that it needs until it has ended."""
        if self.mixture is not None:
            return [member.reference for member in self.mixture.members]
        return [] if self.name is None else [self.reference]


class Failure(BaseModel):
    """Why it could not go on, as an error of the API."""

    model_config = ConfigDict(frozen=True)

    code: str
    message: str
    model: str | None = None  # what could not be asked, if it was one


ENDED_FIRST = Failure(code="draining", message="the server that ran it ended first; ask for it again")


class Evaluation(BaseModel):
    """One task asked of some models."""

    id: str = Field(default_factory=lambda: f"eval_{uuid.uuid4().hex}")
    tenant: str
    state: State = State.QUEUED
    created: float = Field(default_factory=time.time)  # seconds since the epoch
    ended: float | None = None
    task_digest: str
    num_items: int
    kinds: list[Kind]  # of each item
    max_tokens: int
    stop: list[str]
    fingerprint: str  # of all that answers depend on, adapters aside
    models: list[Evaluated]
    gate: str | None = None  # of the adapter whose gate asks, if it was not a request
    scores: list[list[list[float] | None]]  # of each model, of each item; None until it is answered
    num_done: int = 0
    results: list[dict[str, Any]] | None = None  # once it has ended
    comparisons: list[dict[str, Any]] | None = None
    error: Failure | None = None

    @property
    def is_open(self) -> bool:
        """Whether more may come of it."""
        return self.state in (State.QUEUED, State.RUNNING)

    def note(self, model: int, item: int, scores: Sequence[float]) -> None:
        """Add what one model's answer to one item came to; too late for one that has ended."""
        if not self.is_open:
            return
        self.scores[model][item] = list(scores)
        self.num_done += 1

    def end(self, state: State, error: Failure | None = None) -> None:
        """Nothing more comes of it. The first end counts."""
        if self.is_open:
            self.state, self.error, self.ended = state, error, time.time()

    def told(self) -> dict[str, Any]:
        """All but results, as the API tells it."""
        return {
            "object": "evaluation",
            "id": self.id,
            "state": self.state.value,
            "created": self.created,
            "ended": self.ended,
            "task": {"digest": self.task_digest, "num_items": self.num_items},
            "max_tokens": self.max_tokens,
            "stop": self.stop,
            "fingerprint": self.fingerprint,
            "models": [model.model_dump() for model in self.models],
            "gate": self.gate,
            "progress": {"done": self.num_done, "total": self.num_items * len(self.models)},
            "error": None if self.error is None else self.error.model_dump(),
        }

    def told_whole(self) -> dict[str, Any]:
        """With what has come so far."""
        results, compared = self.results, self.comparisons
        if results is None or compared is None:
            results, compared = self._counted()
        return {**self.told(), "results": results, "comparisons": compared}

    def settle(self) -> None:
        """Count what an ended one came to, for good."""
        if not self.is_open and self.results is None:
            self.results, self.comparisons = self._counted()

    def shed(self) -> None:
        """Let go of the scores of one that has been settled, and written."""
        if self.results is not None:
            self.kinds, self.scores = [], []

    def _counted(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        results = [
            {**model.model_dump(), "metrics": metrics_of(self.kinds, scores)}
            for model, scores in zip(self.models, self.scores, strict=True)
        ]
        return results, list(comparisons([model.model for model in self.models], self.scores))
