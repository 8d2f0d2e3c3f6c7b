"""Inputs that are cut keep their special tokens, and of a long text no more is looked at than may matter."""

import asyncio

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from swaplora_server.service.errors import RequestError
from swaplora_server.service.offload import Offload
from swaplora_server.service.prompts import LOOKED_AT, PromptTokenizer, Truncation

A, B, CLS, SEP = range(4)


def cut(text: str | list[int], num_tokens: int, *, keeps_end: bool = False, is_special: bool = True) -> list[int]:
    tokenizer = Tokenizer(models.WordLevel({"a": A, "b": B, "[CLS]": CLS, "[SEP]": SEP}, unk_token="[SEP]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    tokenizer.enable_padding(pad_id=CLS, length=7)  # as the files of some have it
    tokenizer.enable_truncation(5)
    prompts = PromptTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer), 512, Offload(1, 1, "test"))
    truncation = Truncation(num_tokens, keeps_end)
    encode = prompts.encode_all([text], "input[{}]".format, add_special_tokens=is_special, truncation=truncation)
    return asyncio.run(encode)[0]


def test_special_tokens_stay_around_what_is_kept() -> None:
    assert cut("a b b b", 4) == [CLS, A, B, SEP]
    assert cut("a a a b", 4, keeps_end=True) == [CLS, A, B, SEP]
    assert cut("a b", 9) == [CLS, A, B, SEP]
    assert cut("a b b b", 2, is_special=False) == [A, B]


def test_fewer_tokens_than_there_are_special_ones_are_the_first_or_the_last_of_these() -> None:
    assert cut("a b", 1) == [CLS]
    assert cut("a b", 1, keeps_end=True) == [SEP]
    assert cut("a b", 2) == [CLS, SEP]


def test_token_ids_are_cut_as_they_are() -> None:
    assert cut([A, B, A, SEP], 3) == [A, B, A]
    assert cut([A, B, A, SEP], 2, keeps_end=True) == [A, SEP]


def test_a_long_text_costs_what_is_kept_and_is_refused_where_more_might_matter() -> None:
    assert cut("a " * 10**6, 3) == [CLS, A, SEP]
    assert cut("a " * 10**6 + "b", 3, keeps_end=True) == [CLS, B, SEP]
    longest = 5 * 4  # characters of "[CLS]", and tokens that are kept
    assert cut(" " * (longest * LOOKED_AT - 2) + "b", 4) == [CLS, B, SEP]
    with pytest.raises(RequestError) as caught:
        cut(" " * 10**6 + "b", 4)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input[0]")
    assert "160 are looked at" in caught.value.message
