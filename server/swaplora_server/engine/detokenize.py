"""Token ids back into text, piece by piece, with stop strings cut where they begin."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """The text of one sequence as it grows.

    Text that could still turn out to be the beginning of a stop string is held back until it is known.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._stop = tuple(stop)
        self._longest_stop = max(map(len, self._stop), default=0)
        self._first_of_stops = frozenset(stop[0] for stop in self._stop)
        self._include_stop = include_stop
        self._held = ""
        self._undecoded: list[int] = []  # ids behind a character that is not complete yet
        self._skip_special_tokens = skip_special_tokens
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """The text that is settled by one more token; sets `is_stopped` when a stop string is complete."""
        text = self._stream.step(self._tokenizer, token_id)
        if text is None:
            self._undecoded.append(token_id)
            return ""
        self._undecoded.clear()
        if not self._stop:
            return text
        self._held += text
        found = self._earliest_stop()
        if found is not None:
            start, stop = found
            self.is_stopped = True
            settled, self._held = self._held[: start + len(stop) if self._include_stop else start], ""
            return settled
        keep = self._possible_stop_prefix()
        settled, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return settled

    def flush(self) -> str:
        """What was held back, when the sequence ends otherwise; bytes of a character cut short show as U+FFFD."""
        cut = self._tokenizer.decode(self._undecoded, skip_special_tokens=self._skip_special_tokens)
        rest, self._held = self._held + cut, ""
        self._undecoded.clear()
        return rest

    def _earliest_stop(self) -> tuple[int, str] | None:
        found = [(self._held.find(stop), stop) for stop in self._stop]
        return min((hit for hit in found if hit[0] >= 0), default=None)

    def _possible_stop_prefix(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        for length in range(min(len(self._held), self._longest_stop - 1), 0, -1):
            if self._held[-length] in self._first_of_stops and any(
                stop.startswith(self._held[-length:]) for stop in self._stop
            ):
                return length
        return 0
