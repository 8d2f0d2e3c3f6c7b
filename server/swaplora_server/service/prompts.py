"""Texts of clients as token ids. What cannot fit the context is refused before it costs much."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from swaplora_server.service.errors import RequestError
from swaplora_server.service.offload import Offload

LONG_CHARACTERS = 4096
PIECE_CHARACTERS = 1 << 16
LOOKED_AT = 8  # times as many characters as a text of the tokens that are kept can have


class Truncation(NamedTuple):
    """How many tokens are kept of a prompt, special ones among them, and from which end."""

    num_tokens: int
    keeps_end: bool = False


class PromptTokenizer:
    """The base's tokenizer, off the event loop for texts that are long. Belongs to that loop.

    No token stands for more characters than the longest in the vocabulary has, so a text with more than that times the
    context cannot fit. A normalizer that drops characters may make it fit all the same: it is refused, as too long to
    be looked at. Of a long text the tokens are first counted in pieces, where a client's going ends the work, and a
    text whose pieces have twice the tokens that fit is refused: so the cost is that of the context, not of the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_model_len: int, offload: Offload) -> None:
        self._tokenizer = tokenizer
        tokenizer.backend_tokenizer.no_truncation()  # which the files of some ask for, to one length for all texts
        tokenizer.backend_tokenizer.no_padding()
        self._max_model_len = max_model_len
        self._offload = offload
        self._max_token_characters = max(map(len, tokenizer.get_vocab()))

    @property
    def max_characters(self) -> int:
        return self._max_model_len * self._max_token_characters

    async def encode_all(
        self,
        prompts: Sequence[str | list[int]],
        param: Callable[[int], str],
        *,
        add_special_tokens: bool,
        truncation: Truncation | None = None,
    ) -> list[list[int]]:
        """The token ids of each prompt, in the order given; those of ids are left alone, but for a truncation.

        Raises RequestError for a text that cannot fit, whose field `param` names by the prompt's number.
        """
        texts = {number: prompt for number, prompt in enumerate(prompts) if isinstance(prompt, str)}
        looked_at = {number: self._looked_at(text, truncation) for number, text in texts.items()}
        if truncation is None:
            for number, text in texts.items():
                self._check_length(text, param(number))
            for number, text in texts.items():
                if len(text) > PIECE_CHARACTERS:
                    await self._check_pieces(text, param(number))
        encode = partial(self._encoded, add_special_tokens=add_special_tokens, truncation=truncation)
        of_texts = dict(zip(texts, await self._in_batches(list(looked_at.values()), encode), strict=True))
        if truncation is not None:
            for number, token_ids in of_texts.items():
                self._check_cut(texts[number], looked_at[number], token_ids, truncation, param(number))
        return [
            of_texts[number] if isinstance(prompt, str) else prompt if truncation is None else kept(prompt, truncation)
            for number, prompt in enumerate(prompts)
        ]

    async def _in_batches(
        self, texts: Sequence[str], encode: Callable[[Sequence[str]], list[list[int]]]
    ) -> list[list[int]]:
        """By jobs of `PIECE_CHARACTERS` at most, or of one text, unless all are short together."""
        if sum(map(len, texts)) <= LONG_CHARACTERS:
            return encode(texts)
        token_ids: list[list[int]] = []
        for batch in _batches(texts):
            token_ids += await self._offload.do(sum(map(len, batch)), partial(encode, batch))
        return token_ids

    def _encoded(
        self, texts: Sequence[str], *, add_special_tokens: bool, truncation: Truncation | None
    ) -> list[list[int]]:
        """All of each, or what is kept, where the special tokens stay around fewer others."""
        backend = self._tokenizer.backend_tokenizer
        if truncation is None:
            return [
                encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            ]
        num_special = backend.num_special_tokens_to_add(False) if add_special_tokens else 0
        num_kept = max(0, truncation.num_tokens - num_special)
        token_ids = []
        for encoding in backend.encode_batch_fast(texts, add_special_tokens=False):
            encoding.truncate(num_kept, direction="left" if truncation.keeps_end else "right")
            token_ids.append(kept(backend.post_process(encoding, None, add_special_tokens).ids, truncation))
        return token_ids

    def _looked_at(self, text: str, truncation: Truncation | None) -> str:
        """No more of it than may matter."""
        if truncation is None:
            return text
        num_characters = truncation.num_tokens * self._max_token_characters * LOOKED_AT
        return text[-num_characters:] if truncation.keeps_end else text[:num_characters]

    def _check_cut(self, text: str, looked_at: str, token_ids: list[int], truncation: Truncation, param: str) -> None:
        """Raise RequestError where more than was looked at did matter."""
        if len(looked_at) < len(text) and len(token_ids) < truncation.num_tokens:
            reason = f"{param} has {len(text)} characters, of which {len(looked_at)} are looked at"
            raise self._too_long(param, f"{reason}, and these are {len(token_ids)} tokens")

    def _check_length(self, text: str, param: str) -> None:
        if len(text) > self.max_characters:
            raise self._too_long(
                param,
                f"{param} has {len(text)} characters; no more than {self.max_characters} are looked at, which is "
                f"{self._max_token_characters}, the longest token's length, for each token",
            )

    async def _check_pieces(self, text: str, param: str) -> None:
        """Twice what fits, since a token on the border of two pieces falls apart into a few."""
        num_tokens = 0
        for start in range(0, len(text), PIECE_CHARACTERS):
            piece = text[start : start + PIECE_CHARACTERS]
            encode = partial(self._encoded, [piece], add_special_tokens=False, truncation=None)
            num_tokens += len((await self._offload.do(len(piece), encode))[0])
            if num_tokens > 2 * self._max_model_len:
                raise self._too_long(param, f"{param}, of {len(text)} characters, has more than that")

    def _too_long(self, param: str, reason: str) -> RequestError:
        message = f"This model's maximum context length is {self._max_model_len} tokens. However, {reason}. Shorten it."
        return RequestError("context_length_exceeded", message, param)


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """In their order, each of no more than `PIECE_CHARACTERS`, or one text."""
    begun, size = 0, 0
    for number, text in enumerate(texts):
        if number > begun and size + len(text) > PIECE_CHARACTERS:
            yield texts[begun:number]
            begun, size = number, 0
        size += len(text)
    yield texts[begun:]


def kept(token_ids: Sequence[int], truncation: Truncation) -> list[int]:
    """What a truncation leaves of some tokens."""
    start = max(0, len(token_ids) - truncation.num_tokens) if truncation.keeps_end else 0
    return list(token_ids[start : start + truncation.num_tokens])
