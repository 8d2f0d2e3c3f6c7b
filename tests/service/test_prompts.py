"""Prompts are bounded before they are tokenized: what cannot fit costs what the context is worth, not what it is."""

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from swaplora_server.service import prompts as tokenizing
from swaplora_server.service.errors import RequestError
from swaplora_server.service.offload import Offload
from swaplora_server.service.prompts import PromptTokenizer

CONTEXT = 10
LONGEST = 50
PIECE = 100


class Encoded(NamedTuple):
    ids: list[int]


class CountingTokenizer:
    """A token for each `characters` of a text, and note of what it was asked, text by text and job by job."""

    def __init__(self, characters: int) -> None:
        self.asked: list[str] = []
        self.jobs: list[int] = []
        self.backend_tokenizer = self
        self._characters = characters

    def get_vocab(self) -> dict[str, int]:
        return {"x": 0, "x" * LONGEST: 1}

    def no_truncation(self) -> None: ...

    def no_padding(self) -> None: ...

    def encode_batch_fast(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[Encoded]:
        del add_special_tokens
        self.asked += texts
        self.jobs.append(sum(map(len, texts)))
        return [Encoded([0] * -(-len(text) // self._characters)) for text in texts]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "LONG_CHARACTERS", PIECE // 2)
    monkeypatch.setattr(tokenizing, "PIECE_CHARACTERS", PIECE)


def encode(tokenizer: CountingTokenizer, texts: Sequence[str]) -> list[list[int]]:
    async def scenario() -> list[list[int]]:
        prompts = PromptTokenizer(cast(PreTrainedTokenizerFast, tokenizer), CONTEXT, Offload(1, 1, "test"))
        assert prompts.max_characters == CONTEXT * LONGEST
        return await prompts.encode_all(texts, "prompt[{}]".format, add_special_tokens=True)

    return asyncio.run(scenario())


def refusal(tokenizer: CountingTokenizer, texts: Sequence[str]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        encode(tokenizer, texts)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", f"prompt[{len(texts) - 1}]")
    assert caught.value.message.startswith(f"This model's maximum context length is {CONTEXT} tokens. However, prompt[")
    return caught.value


def test_a_text_that_cannot_fit_never_reaches_the_tokenizer() -> None:
    tokenizer = CountingTokenizer(1)
    assert f"has {CONTEXT * LONGEST + 1} characters; no more than {CONTEXT * LONGEST}" in str(
        refusal(tokenizer, ["x", "x" * (CONTEXT * LONGEST + 1)])
    )
    assert tokenizer.asked == []


def test_a_text_of_too_many_tokens_is_read_no_further_than_that_is_plain() -> None:
    tokenizer = CountingTokenizer(8)
    assert "has more than that" in str(refusal(tokenizer, ["x" * CONTEXT * LONGEST]))
    assert tokenizer.asked == ["x" * PIECE] * 2


def test_a_text_that_may_fit_is_tokenized_whole() -> None:
    """By its pieces it has more tokens than fit, which the pieces' own borders may be to blame for."""
    text = "x" * (3 * PIECE)
    tokenizer = CountingTokenizer(20)
    assert encode(tokenizer, [text]) == [[0] * 15]
    assert tokenizer.asked == ["x" * PIECE] * 3 + [text]


@given(st.lists(st.integers(0, CONTEXT * LONGEST), min_size=1, max_size=4))
def test_what_is_encoded_is_what_the_tokenizer_makes_of_the_whole(lengths: list[int]) -> None:
    texts = ["x" * length for length in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "LONG_CHARACTERS", PIECE // 2)
        patch.setattr(tokenizing, "PIECE_CHARACTERS", PIECE)
        tokenizer = CountingTokenizer(LONGEST)
        assert encode(tokenizer, texts) == [[0] * -(-length // LONGEST) for length in lengths]


@given(st.lists(st.integers(0, PIECE), min_size=1, max_size=40))
def test_many_short_texts_are_few_jobs_that_are_no_larger_than_a_piece(lengths: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "LONG_CHARACTERS", PIECE // 2)
        patch.setattr(tokenizing, "PIECE_CHARACTERS", PIECE)
        tokenizer = CountingTokenizer(LONGEST)
        assert encode(tokenizer, ["x" * length for length in lengths]) == [[0] * -(-n // LONGEST) for n in lengths]
    assert max(tokenizer.jobs) <= PIECE
    assert all(one + other > PIECE for one, other in pairwise(tokenizer.jobs[:-1]))
    assert sum(tokenizer.jobs) == sum(lengths)
