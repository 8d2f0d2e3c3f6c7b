"""What became of one request, as its client saw it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from swaplora_server.bench.workload import PromptRequest

MAX_WORDS = 300  # characters of a server's words that are worth showing


@dataclass(slots=True)
class Answer:
    """The answer to `request`. All times are seconds of one monotonic clock.

    `began` is when the request was due, so that one sent late does not look fast; `stamps` has a time for each chunk
    that brought text or token ids. Tokens are counted by the server's `usage`: a chunk may hold several.
    """

    request: PromptRequest
    began: float
    ended: float = 0.0
    stamps: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    failure: str | None = None  # why it is not a whole answer, in one line
    is_done: bool = False

    @property
    def ttft(self) -> float:
        """Time to the first token (TTFT)."""
        return self.stamps[0] - self.began

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first (TPOT); None where there is no other."""
        later = self.num_output_tokens - 1
        return (self.stamps[-1] - self.stamps[0]) / later if later > 0 else None

    @property
    def gaps(self) -> list[float]:
        """Times between two chunks with tokens: inter-token latencies (ITL) where a chunk has one."""
        return [after - before for before, after in pairwise(self.stamps)]

    @property
    def latency(self) -> float:
        """Time to the end of the answer."""
        return self.ended - self.began

    def read_event(self, data: bytes, now: float) -> None:
        """Take in one event of the stream, which came at `now`."""
        if data.strip() == b"[DONE]":
            self.is_done = True
            self._check_whole()
            return
        try:
            chunk = json.loads(data)
        except ValueError:
            chunk = None
        if not isinstance(chunk, dict):
            self.fail(f"an event of the stream is not a JSON object: {_words(data.decode(errors='replace'))}")
        elif chunk.get("error") is not None:
            self.fail(f"error in the stream: {error_words(chunk)}")
        else:
            try:
                self._read_chunk(chunk, now)
            except (AttributeError, KeyError, TypeError, ValueError):
                self.fail(f"an event of the stream is not a completion's chunk: {error_words(chunk)}")

    def fail(self, reason: str) -> None:
        """Remember the first thing that went wrong."""
        self.failure = self.failure or reason

    def _read_chunk(self, chunk: Mapping[str, Any], now: float) -> None:
        if any(choice.get("text") or choice.get("token_ids") for choice in chunk.get("choices") or ()):
            self.stamps.append(now)
        if usage := chunk.get("usage"):
            self.num_prompt_tokens = int(usage["prompt_tokens"])
            self.num_output_tokens = int(usage["completion_tokens"])
            self.num_cached_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)

    def _check_whole(self) -> None:
        if not self.num_output_tokens:
            self.fail("the stream has no usage: tokens cannot be counted on this server")
        elif not self.stamps:
            self.fail("the stream has no chunk with text or token ids")


def error_words(body: object) -> str:
    """A server's own words out of an error body: OpenAI's form, or whatever it is, in one printable line."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return _words(message if isinstance(message, str) else json.dumps(message))


def _words(text: str) -> str:
    printable = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(printable.split())[:MAX_WORDS]
