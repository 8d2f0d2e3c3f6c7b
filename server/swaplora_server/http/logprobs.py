"""Log-probabilities as each API writes them: chat's, the legacy one of completions, and vLLM's of prompts."""

import codecs
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from swaplora_server.base.vocabulary import Vocabulary, named, shown
from swaplora_server.engine.request import Logprobs
from swaplora_server.service.detokenize import TextToken


def chat_logprobs(vocabulary: Vocabulary, tokens: Iterable[TextToken]) -> dict[str, Any]:
    """OpenAI's shape for chats: each token as far as it is in the text, and the likeliest in its place as a whole."""
    return {"content": [_chat_token(vocabulary, token, token.logprobs) for token in tokens if token.logprobs]}


def _chat_token(vocabulary: Vocabulary, token: TextToken, logprobs: Logprobs) -> dict[str, Any]:
    names = _names(vocabulary, token.token_id, logprobs)
    others = [_entry(names[other], vocabulary.bytes_of(other), logprob) for other, logprob in logprobs.top]
    name = shown(token.data) if _is_cut(vocabulary, token) else names[token.token_id]
    return {**_entry(name, token.data, logprobs.chosen), "top_logprobs": others}


def _entry(name: str, data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": name, "logprob": logprob, "bytes": list(data)}


@dataclass(slots=True)
class LegacyLogprobs:
    """OpenAI's shape for completions. Of a stream it counts the characters of each choice that went before."""

    vocabulary: Vocabulary
    _lengths: dict[int, "_Length"] = field(default_factory=lambda: defaultdict(_Length))

    def of(self, choice: int, tokens: Sequence[TextToken]) -> dict[str, Any]:
        """The next tokens of a choice, each where its first character stands. The first of a prompt has no logprob."""
        length = self._lengths[choice]
        return {
            "text_offset": [length.before(token.data) for token in tokens],
            "token_logprobs": [token.logprobs and token.logprobs.chosen for token in tokens],
            "tokens": [self._name(token) for token in tokens],
            "top_logprobs": [token.logprobs and self._top(token.token_id, token.logprobs) for token in tokens],
        }

    def _name(self, token: TextToken) -> str:
        if _is_cut(self.vocabulary, token):
            return _legacy_name(shown(token.data), token.data)
        return _legacy_name(named([token.token_id], self.vocabulary)[token.token_id], token.data)

    def _top(self, token_id: int, logprobs: Logprobs) -> dict[str, float]:
        """The likeliest, and the token itself where it is none of them."""
        names = _names(self.vocabulary, token_id, logprobs)
        return {
            _legacy_name(names[other], self.vocabulary.bytes_of(other)): logprob
            for other, logprob in {token_id: logprobs.chosen, **dict(logprobs.top)}.items()
        }


def prompt_logprobs(
    vocabulary: Vocabulary, prompt_ids: Sequence[int], scores: Sequence[Logprobs]
) -> list[dict[str, Any] | None]:
    """vLLM's shape: for each token of a prompt but the first the token itself and the likeliest, by id."""
    return [None, *(_by_id(vocabulary, *scored) for scored in zip(prompt_ids[1:], scores, strict=True))]


def _by_id(vocabulary: Vocabulary, token_id: int, logprobs: Logprobs) -> dict[str, Any]:
    names = _names(vocabulary, token_id, logprobs)
    ranked = {other: (logprob, rank) for rank, (other, logprob) in enumerate(logprobs.top, 1)}
    return {
        str(other): {"logprob": logprob, "rank": rank, "decoded_token": names[other]}
        for other, (logprob, rank) in {token_id: (logprobs.chosen, logprobs.rank), **ranked}.items()
    }


def _names(vocabulary: Vocabulary, token_id: int, logprobs: Logprobs) -> dict[int, str]:
    return named({token_id, *(other for other, _ in logprobs.top)}, vocabulary)


def _is_cut(vocabulary: Vocabulary, token: TextToken) -> bool:
    return token.data not in (b"", vocabulary.bytes_of(token.token_id))


def _legacy_name(name: str, data: bytes) -> str:
    r"""A part of a character as OpenAI's completions have it: `bytes:\xf0\x9f`."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(map(r"\x{:02x}".format, data))
    return name


class _Length:
    """How many characters a text has that comes as bytes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_chars = 0

    def before(self, data: bytes) -> int:
        """How many there were before `data`, which is counted in."""
        before = self._num_chars
        self._num_chars += len(self._decoder.decode(data))
        return before
