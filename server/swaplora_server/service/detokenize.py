"""Token ids back into text, piece by piece, with stop strings cut where they begin."""

import codecs
import itertools
import sys
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from swaplora_server.base.vocabulary import Vocabulary
from swaplora_server.engine.request import Logprobs
from swaplora_server.service.stop_strings import Match, StopFinder, StopStrings, Unit

_LONGEST_CHARACTER = 4


class TextToken(NamedTuple):
    """A token with logprobs, and what of its bytes is in the text: all, unless it is hidden or a stop string cut it.

    Of the first token of a prompt there are no logprobs.
    """

    token_id: int
    data: bytes
    logprobs: Logprobs | None


class Settled(NamedTuple):
    """Text that nothing takes back, and tokens with logprobs that nothing cuts any more."""

    text: str
    tokens: Sequence[TextToken] = ()


@dataclass(frozen=True)
class TextRules:
    """What one request's text leaves out, and where it stops."""

    vocabulary: Vocabulary
    stop: Sequence[str] = ()
    may_end_at: Callable[[int], bool] = lambda _number: True  # of the token by which a stop string is complete
    include_stop: bool = False
    skip_special_tokens: bool = True
    shown: Collection[str] = ()  # the names of special tokens that are shown all the same
    hidden: Mapping[int, str] = field(init=False)  # the special tokens that are left out
    stops: StopStrings = field(init=False)

    def __post_init__(self) -> None:
        special = self.vocabulary.special if self.skip_special_tokens else {}
        hidden = {token_id: name for token_id, name in special.items() if name not in self.shown}
        object.__setattr__(self, "hidden", hidden if self.shown else special)
        object.__setattr__(self, "stops", StopStrings(self.stop, self.hidden))

    def end_of(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last tokens of a prompt that are in a text: as many as can hold a character that goes on behind them."""
        end: list[int] = []
        num_bytes = 0
        for token_id in reversed(prompt_ids):
            if token_id not in self.hidden and self.vocabulary.piece(token_id) is not None:
                end.append(token_id)
                num_bytes += len(self.vocabulary.bytes_of(token_id))
                if num_bytes >= _LONGEST_CHARACTER:
                    break
        return end[::-1]


@dataclass(slots=True)
class _Unsettled:
    """A token that may still be cut."""

    token: TextToken
    start: int  # characters before it, but for one that it completes
    end: int  # characters with it, and with one that it only begins
    carry: bytes  # of the character that it goes on with


class Detokenizer:
    """The text of one sequence as it grows, from where its prompt ends: both together are what all ids decode to.

    Bytes that are no character become U+FFFD as Unicode recommends, and the text goes on after them. A character that
    the prompt leaves incomplete belongs to the text if that completes it. Text that could still turn out to be the
    beginning of a stop string is held back until it is known, and so are the tokens it is made of.
    """

    def __init__(self, rules: TextRules, prompt_ids: Sequence[int] = (), *, is_echoed: bool = False) -> None:
        """`is_echoed`: the prompt's text goes before, as far as its characters are complete."""
        self._rules = rules
        self._vocabulary, self._hidden = rules.vocabulary, rules.hidden
        self._decoder = _Utf8Decoder(errors="replace")
        self._is_first = True  # no token that is shown came yet, not in the prompt either
        # of the prompt `TextRules.end_of` it is enough
        self._is_in_prompt = self._read_prompt(prompt_ids) and not is_echoed
        self._finder = StopFinder(rules.stops) if rules.stop else None
        self._held = ""
        self._num_tokens = self._num_chars = 0
        self._unsettled: deque[_Unsettled] = deque()
        self.is_stopped = False
        self.stopped_by: str | None = None  # the stop string

    def push(self, token_id: int, logprobs: Logprobs | None = None) -> Settled:
        """What is settled by one more token; sets `is_stopped` when a stop string is complete."""
        data = self.bytes_of(token_id)
        if self._finder is None:
            tokens = () if logprobs is None else (TextToken(token_id, data, logprobs),)
            return Settled(self._decode(data), tokens)
        self._num_tokens += 1
        is_named = token_id in self._rules.stops.token_ids
        carry, start = self._pending, self._num_chars
        text = self._decode(data, is_last=is_named)  # such a token stands between two characters
        self._num_chars += len(text)
        if logprobs is not None:
            end = self._num_chars + bool(self._pending)
            self._unsettled.append(_Unsettled(TextToken(token_id, data, logprobs), start, end, carry))
        return self._settle(self._finder, text, [*text, token_id] if is_named else text)

    def flush(self) -> Settled:
        """What was held back, when the sequence ends otherwise; bytes of a character cut short show as U+FFFD."""
        text = self._decode(b"", is_last=True)
        if self._finder is None:
            return Settled(text)
        self._num_chars += len(text)
        settled = self._settle(self._finder, text, text)
        if self.is_stopped:
            return settled
        rest, self._held = self._held, ""
        return Settled(settled.text + rest, [*settled.tokens, *self._take(self._num_chars)])

    @property
    def _pending(self) -> bytes:
        """The beginning of a character that is not complete yet."""
        return self._decoder.getstate()[0]

    def _read_prompt(self, prompt_ids: Sequence[int]) -> bool:
        """Begin in the middle of the character that the prompt leaves incomplete; whether there is one."""
        end = self._rules.end_of(prompt_ids)
        self._is_first = not end
        self._decoder.decode(b"".join(map(self._vocabulary.bytes_of, end)))
        return bool(self._pending)

    def _decode(self, data: bytes, *, is_last: bool = False) -> str:
        text = self._decoder.decode(data, is_last)
        if text and self._is_in_prompt:
            self._is_in_prompt = False
            return text.removeprefix("\ufffd")  # which the prompt ends with
        return text

    def bytes_of(self, token_id: int) -> bytes:
        """What the next token adds to the text. To be asked once for each."""
        if token_id in self._hidden:
            return b""
        if not self._is_first:
            return self._vocabulary.bytes_of(token_id)
        self._is_first = self._vocabulary.piece(token_id) is None
        return self._vocabulary.first_bytes_of(token_id)

    def _settle(self, finder: StopFinder, text: str, units: Sequence[Unit]) -> Settled:
        self._held += text
        match = finder.read(units, may_stop=self._rules.may_end_at(self._num_tokens))
        if match is not None:
            self.is_stopped, self.stopped_by = True, match.text
            return self._cut(match, self._num_chars - len(text) + min(match.end, len(text)))
        num_held = finder.num_held
        length = len(self._held) - num_held
        settled, self._held = self._held[:length], self._held[length:]
        is_holding = bool(self._unsettled) and finder.is_holding_tokens
        return Settled(settled, self._take(self._num_chars - num_held, is_holding_hidden=is_holding))

    def _cut(self, match: Match, end: int) -> Settled:
        """What is left before the stop string, or with it, which ends after `end` characters."""
        start = end - match.length
        before = self._held[: len(self._held) - self._num_chars + start]
        self._mark_hidden_tokens(match)
        if not self._rules.include_stop:
            return Settled(before, self._tokens_of(start))
        return Settled(before + match.text, self._tokens_of(end))

    def _mark_hidden_tokens(self, match: Match) -> None:
        """Those in the stop string take no room in the text: say that they go with it, or show their names there."""
        newest_first = (one for one in reversed(self._unsettled) if one.token.token_id in match.hidden)
        for one in itertools.islice(newest_first, len(match.hidden)):
            if self._rules.include_stop:
                one.token = one.token._replace(data=self._hidden[one.token.token_id].encode())
            else:
                one.end = sys.maxsize

    def _tokens_of(self, num_chars: int) -> list[TextToken]:
        """The tokens of the first `num_chars` characters, the last as far as it belongs to them."""
        tokens = self._take(num_chars)
        if self._unsettled:
            last = self._unsettled[0]
            if data := _first_characters(last.carry, last.token.data, num_chars - last.start):
                tokens.append(last.token._replace(data=data))
        return tokens

    def _take(self, num_chars: int, *, is_holding_hidden: bool = False) -> list[TextToken]:
        """The tokens that belong to the first `num_chars` characters alone; hidden ones behind them may be held."""
        taken = []
        while self._unsettled and self._unsettled[0].end <= num_chars:
            token = self._unsettled[0].token
            if is_holding_hidden and self._unsettled[0].start == num_chars and token.token_id in self._hidden:
                break
            taken.append(token)
            self._unsettled.popleft()
        return taken


class Echo(NamedTuple):
    """The text of a prompt, as far as its characters are complete, and what of it each token is."""

    text: str
    data: Sequence[bytes]


def echo_of(rules: TextRules, prompt_ids: Sequence[int]) -> Echo:
    """A prompt, as what follows it goes on."""
    detokenizer = Detokenizer(rules)
    data = [detokenizer.bytes_of(token_id) for token_id in prompt_ids]
    return Echo(_Utf8Decoder(errors="replace").decode(b"".join(data)), data)


_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


def _first_characters(carry: bytes, data: bytes, num_chars: int) -> bytes:
    """The bytes of `data` that complete the first `num_chars` characters of `carry + data`."""
    decoder, length = _Utf8Decoder(errors="replace"), 0
    decoder.decode(carry)
    for place, byte in enumerate(data):
        if length >= num_chars:
            return data[:place]
        length += len(decoder.decode(bytes([byte])))
        if length > num_chars:
            return data[:place]  # it ended one that it does not belong to
    return data
