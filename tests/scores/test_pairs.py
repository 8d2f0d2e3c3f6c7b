"""A pair of texts is encoded and cut as transformers does it, whatever the tokenizer puts around them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from swaplora_server.service.pooling.layout import Layouts, kept_of_pair, layouts_of
from swaplora_server.service.prompts import Truncation, kept

A, B, CLS, SEP = range(4)
_SPECIAL = [("[CLS]", CLS), ("[SEP]", SEP)]
POST_PROCESSORS = {
    "bert": processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS)),
    "roberta": processors.RobertaProcessing(("[SEP]", SEP), ("[CLS]", CLS)),
    "template": processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $B:1 [SEP]:1 $A [SEP]", special_tokens=_SPECIAL
    ),
    "decoder": processors.ByteLevel(),
    "none": None,
}
TEXTS = st.lists(st.sampled_from("ab"), min_size=1, max_size=12).map(" ".join)


def transformers_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"a": A, "b": B, "[CLS]": CLS, "[SEP]": SEP}, unk_token="[SEP]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if POST_PROCESSORS[kind] is not None:
        tokenizer.post_processor = POST_PROCESSORS[kind]
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names)


TOKENIZERS = {kind: transformers_tokenizer(kind) for kind in POST_PROCESSORS}


def layouts(kind: str) -> Layouts:
    return layouts_of(TOKENIZERS[kind].backend_tokenizer)


@pytest.mark.parametrize("kind", POST_PROCESSORS)
@given(first=TEXTS, second=TEXTS, room=st.integers(2, 26), keeps_end=st.booleans())
def test_pairs_are_encoded_and_cut_as_transformers_does(
    kind: str, first: str, second: str, room: int, keeps_end: bool
) -> None:
    tokenizer, layout = TOKENIZERS[kind], layouts(kind).pair
    tokenizer.truncation_side = "left" if keeps_end else "right"
    longest = room + layout.num_special
    right = tokenizer(first, second, truncation="longest_first", max_length=longest)
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in (first, second)]
    lengths = kept_of_pair(len(texts[0]), len(texts[1]), room)
    cut = [kept(text, Truncation(length, keeps_end)) for text, length in zip(texts, lengths, strict=True)]
    filled = layout.filled(*cut, has_types=True)
    assert layout.filled(*cut) == (filled.token_ids, None)
    assert filled.token_ids == right["input_ids"]
    assert filled.token_types == right["token_type_ids"]


@pytest.mark.parametrize("kind", POST_PROCESSORS)
def test_one_text_is_encoded_as_transformers_does(kind: str) -> None:
    for text in ("a", "a b b a"):
        ids = TOKENIZERS[kind].encode(text, add_special_tokens=False)
        assert layouts(kind).single.filled(ids).token_ids == TOKENIZERS[kind].encode(text)
