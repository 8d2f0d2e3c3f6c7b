"""Texts of clients as token ids. What cannot fit the context is refused before it costs much."""

from collections.abc import Callable, Sequence
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
        if truncation is not None:
            return [
                await self._encode_truncated(prompt, param(number), add_special_tokens, truncation)
                for number, prompt in enumerate(prompts)
            ]
        texts = {number: prompt for number, prompt in enumerate(prompts) if isinstance(prompt, str)}
        for number, text in texts.items():
            self._check_length(text, param(number))
        is_long = sum(map(len, texts.values())) > LONG_CHARACTERS
        return [
            await self._encode(prompt, param(number), is_long, add_special_tokens)
            if isinstance(prompt, str)
            else prompt
            for number, prompt in enumerate(prompts)
        ]

    async def _encode(self, text: str, param: str, is_long: bool, add_special_tokens: bool) -> list[int]:
        def encode() -> list[int]:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

        if not is_long:
            return encode()
        if len(text) > PIECE_CHARACTERS:
            await self._check_pieces(text, param)
        return await self._offload.do(len(text), encode)

    async def _encode_truncated(
        self, prompt: str | list[int], param: str, add_special_tokens: bool, truncation: Truncation
    ) -> list[int]:
        """What is kept of `prompt`. Of a text no more is looked at than may matter; RequestError where it did."""
        if not isinstance(prompt, str):
            return kept(prompt, truncation)
        num_characters = truncation.num_tokens * self._max_token_characters * LOOKED_AT
        text = prompt[-num_characters:] if truncation.keeps_end else prompt[:num_characters]
        encode = partial(self._truncated, text, add_special_tokens, truncation)
        token_ids = encode() if len(text) <= LONG_CHARACTERS else await self._offload.do(len(text), encode)
        if len(text) < len(prompt) and len(token_ids) < truncation.num_tokens:
            reason = f"{param} has {len(prompt)} characters, of which {num_characters} are looked at"
            raise self._too_long(param, f"{reason}, and these are {len(token_ids)} tokens")
        return token_ids

    def _truncated(self, text: str, add_special_tokens: bool, truncation: Truncation) -> list[int]:
        """The special tokens stay, around fewer others."""
        backend = self._tokenizer.backend_tokenizer
        num_special = backend.num_special_tokens_to_add(False) if add_special_tokens else 0
        encoding = backend.encode(text, add_special_tokens=False)
        encoding.truncate(
            max(0, truncation.num_tokens - num_special), direction="left" if truncation.keeps_end else "right"
        )
        return kept(backend.post_process(encoding, None, add_special_tokens).ids, truncation)

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
            num_tokens += await self._offload.do(len(piece), partial(self._num_tokens, piece))
            if num_tokens > 2 * self._max_model_len:
                raise self._too_long(param, f"{param}, of {len(text)} characters, has more than that")

    def _num_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def _too_long(self, param: str, reason: str) -> RequestError:
        message = f"This model's maximum context length is {self._max_model_len} tokens. However, {reason}. Shorten it."
        return RequestError("context_length_exceeded", message, param)


def kept(token_ids: Sequence[int], truncation: Truncation) -> list[int]:
    """What a truncation leaves of some tokens."""
    start = max(0, len(token_ids) - truncation.num_tokens) if truncation.keeps_end else 0
    return list(token_ids[start : start + truncation.num_tokens])
