"""What is counted: generations and poolings as they end, and the server as it stands. Plain data."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from swaplora_adapters.registry.card import AdapterState
from swaplora_server.engine.request import OVERDUE_CODE, FinishReason
from swaplora_server.engine.snapshot import Snapshot


class Outcome(enum.StrEnum):
    """How a generation or a pooling ended: whole, left by its client, by its time limit, or with another error."""

    COMPLETED = "completed"
    ABANDONED = "abandoned"
    EXPIRED = "expired"
    FAILED = "failed"

    @classmethod
    def of_error(cls, code: str) -> "Outcome":
        return cls.EXPIRED if code == OVERDUE_CODE else cls.FAILED


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What has ended. Times are in seconds; None is what did not come to be."""

    outcome: Outcome
    tenant: str = ""
    adapters: tuple[str, ...] = ()  # by name; of a sum all, none for the base
    num_prompt_tokens: int  # of all prompts, or inputs
    seconds: float  # from the request to its end
    seconds_for_adapters: float  # that it waited for them
    seconds_queued: float | None  # from the request until the first prompt was begun


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingRecord(Record):
    """Inputs of one request, of which embeddings, classes or scores were made."""

    num_inputs: int

    def told(self) -> dict[str, int | float | str]:
        """What the log says of it; what did not come to be is left out."""
        queued = {} if self.seconds_queued is None else {"queue_seconds": round(self.seconds_queued, 4)}
        return {"inputs": self.num_inputs, "prompt_tokens": self.num_prompt_tokens, **queued}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRecord(Record):
    """A generation that has ended."""

    num_generated: tuple[int, ...]  # tokens of each choice
    finish_reasons: tuple[FinishReason, ...]  # of each choice
    n: int = 1
    max_tokens: int
    seconds_to_first: float | None  # from the request to the first token
    seconds_to_last: float | None

    @property
    def num_generated_tokens(self) -> int:
        return sum(self.num_generated)

    def told(self) -> dict[str, int | float | str]:
        """What the log says of it; what did not come to be is left out."""
        times = {"queue_seconds": self.seconds_queued, "first_token_seconds": self.seconds_to_first}
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "output_tokens": self.num_generated_tokens,
            "finish_reason": ", ".join(dict.fromkeys(self.finish_reasons)),
            **{name: round(seconds, 4) for name, seconds in times.items() if seconds is not None},
        }

    @property
    def num_longest(self) -> int:
        """Tokens of the longest choice."""
        return max(self.num_generated)

    @property
    def seconds_per_token(self) -> float | None:
        """Between two tokens, the mean of the longest choice."""
        if self.seconds_to_first is None or self.seconds_to_last is None or self.num_longest < 2:
            return None
        return (self.seconds_to_last - self.seconds_to_first) / (self.num_longest - 1)


@dataclass(frozen=True, slots=True)
class ServerState:
    """The engine and the adapters at one moment."""

    engine: Snapshot
    resident_bytes: int  # of adapters, where steps read them
    budget_bytes: int  # for these
    host_bytes: int  # of adapters, in the host's memory beside a GPU's
    adapters: Sequence[AdapterState]  # in order of name
    aliases: Sequence[tuple[str, Sequence[str]]] = ()  # each with the names of the adapters that it stands for
    tenants: Mapping[str, int] = field(default_factory=dict)  # sequences of each that run or wait
    revision: int = 0  # of the last change of any name or alias
