"""Prompts are bounded before they are tokenized: what cannot fit costs what the context is worth, not what it is."""

import asyncio
from collections.abc import Sequence
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from swaplora_server.service import prompts as tokenizing
from swaplora_server.service.errors import RequestError
from swaplora_server.service.offload import Offload
from swaplora_server.service.prompts import PromptTokenizer

CONTEXT = 10
LONGEST = 50
PIECE = 100


class CountingTokenizer:
    """A token for each `characters` of a text, and note of what it was asked."""

    def __init__(self, characters: int) -> None:
        self.asked: list[str] = []
        self.backend_tokenizer = Tokenizer(models.BPE())
        self._characters = characters

    def get_vocab(self) -> dict[str, int]:
        return {"x": 0, "x" * LONGEST: 1}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.asked.append(text)
        return [0] * -(-len(text) // self._characters)


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
        assert encode(CountingTokenizer(LONGEST), texts) == [[0] * -(-length // LONGEST) for length in lengths]
