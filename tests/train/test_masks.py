"""Which tokens are learnt, against masks made by hand, and the loss of these alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, processors
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

import tiny
from lessons import TEMPLATE, chat, write
from swaplora_adapters.train.batches import collate, steps_of
from swaplora_adapters.train.data import DataError, Example, read_data
from swaplora_adapters.train.encode import Encoder, EncodingError, Limit, Tokens, encode_all

Part = tuple[str | int, bool]  # text or a token, and whether it is learnt
MARKED = (
    "{% for message in messages %}<{{ message.role }}>{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|eos|>{% endgeneration %}{% else %}{{ message.content }}<|eos|>{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = ("hi", "yes", "and", "no")
BY_HAND: Sequence[Part] = (
    *(("<user>hi", False), (tiny.EOS, False), ("\n<assistant>", False), ("yes", True), (tiny.EOS, True)),
    *(("\n<user>and", False), (tiny.EOS, False), ("\n<assistant>", False), ("no", True), (tiny.EOS, True)),
    ("\n", False),
)


def encoder(template: str | None = TEMPLATE) -> Encoder:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = template
    return Encoder(tokenizer, frozenset())


def by_hand(parts: Sequence[Part]) -> Tokens:
    tokenizer = tiny.byte_tokenizer()
    ids: list[int] = []
    marks: list[bool] = []
    for part, is_learnt in parts:
        own = [part] if isinstance(part, int) else tokenizer(part, add_special_tokens=False)["input_ids"]
        ids += own
        marks += [is_learnt] * len(own)
    return Tokens(ids, marks)


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_each_answer_is_learnt_with_the_token_that_ends_it_and_nothing_else(template: str) -> None:
    assert encoder(template).encode(Example(1, chat(*TURNS))) == by_hand(BY_HAND)


def test_a_completion_is_learnt_with_the_token_that_ends_it() -> None:
    expected = by_hand([("Q: a", False), (" b", True), (tiny.EOS, True)])
    assert encoder().encode(Example(1, {"prompt": "Q: a", "completion": " b"})) == expected


@given(st.text(), st.text(min_size=1))
def test_a_prompt_has_the_tokens_that_a_server_sees(prompt: str, completion: str) -> None:
    tokens = encoder().encode(Example(1, {"prompt": prompt, "completion": completion}))
    tokenizer = tiny.byte_tokenizer()
    before = tokenizer(prompt)["input_ids"] if prompt else []
    assert list(tokens.ids[: len(before)]) == before
    assert list(tokens.is_learnt) == [place >= len(before) for place in range(tokens.length)]
    assert tokens.ids[-1] == tiny.EOS


def test_a_token_across_the_edge_is_made_into_two() -> None:
    """`a` and `b` are one token in one text; a server sees the prompt alone."""
    model = models.BPE(vocab={"x": 0, "a": 1, "b": 2, "y": 3, "ab": 4, "<eos>": 5}, merges=[("a", "b")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="<eos>")
    assert tokenizer("xaby")["input_ids"] == [0, 4, 3]
    found = Encoder(tokenizer, frozenset()).encode(Example(1, {"prompt": "xa", "completion": "by"}))
    assert found == Tokens([0, 1, 2, 3, 5], [False, False, True, True, True])


def test_an_answer_behind_a_torn_token_begins_with_no_space_of_its_own() -> None:
    """SentencePiece's kind puts one before any text: `cd` alone would be `▁cd`."""
    pieces = ["<unk>", "<s>", "</s>", *"▁abcd0|", "bc", "▁c"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    model = Tokenizer(models.BPE(vocab=vocab, merges=[("b", "c"), ("▁", "c")], unk_token="<unk>"))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", unk_token="<unk>")
    found = Encoder(tokenizer, frozenset()).encode(Example(1, {"prompt": "ab", "completion": "cd"}))
    assert tokenizer.convert_ids_to_tokens(list(found.ids)) == ["▁", "a", "b", "c", "d", "</s>"]
    assert list(found.is_learnt) == [False] * 3 + [True] * 3


def test_an_answer_that_is_no_tokens_of_its_own_is_refused() -> None:
    """Its first letter is always of one token with the one before it."""
    befores = "0|a\n"
    pieces = ["<eos>", *befores, "x", *(f"{letter}x" for letter in befores)]
    merges = [(letter, "x") for letter in befores]
    model = models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="<eos>")
    with pytest.raises(EncodingError, match="no tokens of 'x' apart"):
        Encoder(tokenizer, frozenset()).encode(Example(1, {"prompt": "a", "completion": "x"}))


def test_of_several_templates_the_default_is_taken_and_none_is_refused() -> None:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": MARKED}
    assert Encoder(tokenizer, frozenset()).encode(Example(1, chat(*TURNS))) == by_hand(BY_HAND)
    tokenizer.chat_template = {"rag": TEMPLATE, "tool_use": MARKED}
    with pytest.raises(EncodingError, match="several chat templates, rag, tool_use, and none is called default"):
        Encoder(tokenizer, frozenset()).encode(Example(1, chat(*TURNS)))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        (tiny.CHAT_TEMPLATE, "no end-of-sequence token"),
        (MARKED.replace("<|eos|>{% endgeneration %}", "{% endgeneration %}<|eos|>"), "no end-of-sequence token"),
        ("{{ raise_exception('only two turns') }}", "the chat template refuses it: only two turns"),
        (
            TEMPLATE.replace("{{ message.content }}", "{{ message.content if loop.last else '…' }}"),
            "writes the beginning otherwise once messages[1] is answered",
        ),
        # what ends the user's turn does not end the assistant's
        (TEMPLATE.replace("<|eos|>", "{{ '<|eos|>' if message.role == 'user' }}"), "no end-of-sequence token"),
    ],
)
def test_a_template_of_which_no_answer_can_be_learnt_is_refused(template: str | None, words: str) -> None:
    with pytest.raises(EncodingError, match=r"token|template") as refused:
        encoder(template).encode(Example(1, chat(*TURNS)))
    assert words in str(refused.value)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(EncodingError, match="no end-of-sequence token"):
        Encoder(tokenizer, frozenset())


def test_what_is_too_long_is_refused_by_line_or_cut_and_counted(tmp_path: Path) -> None:
    data = read_data(write(tmp_path / "d.jsonl", [{"prompt": "a" * n, "completion": "b"} for n in (3, 9, 12)]))
    with pytest.raises(DataError) as refused:
        encode_all(encoder(), data, data.examples, Limit(10, may_cut=False))
    assert [reason.partition(":")[2][:25] for reason in refused.value.reasons] == [
        " line 2 has 11 tokens and",
        " line 3 has 14 tokens and",
    ]
    found, num_cut = encode_all(encoder(), data, data.examples, Limit(10, may_cut=True))
    assert num_cut == 2
    assert [tokens.length for tokens in found] == [5, 10, 10]
    assert [sum(tokens.is_learnt) for tokens in found] == [2, 2, 2]


def test_what_begins_every_text_is_not_cut_off(tmp_path: Path) -> None:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.pad_token} $A", special_tokens=[(tokenizer.pad_token, tiny.PAD)]
    )
    data = read_data(write(tmp_path / "d.jsonl", [{"prompt": "abcdef", "completion": "b"}]))
    ((tokens,), num_cut) = encode_all(Encoder(tokenizer, frozenset()), data, data.examples, Limit(5, may_cut=True))
    plain = tokenizer("ef", add_special_tokens=False)["input_ids"]
    assert (list(tokens.ids[:3]), tokens.length, num_cut) == ([tiny.PAD, *plain], 5, 1)
    assert list(tokens.is_learnt) == [False, False, False, True, True]


@pytest.mark.parametrize("only_learnt", [True, False])
def test_the_loss_is_that_of_the_learnt_tokens_alone(only_learnt: bool) -> None:
    """Against logits of each example by itself, and masks made by hand."""
    model: Any = tiny.tiny_model()
    conversation = by_hand(BY_HAND)
    pair = by_hand([("Q: a", False), (" b", True), (tiny.EOS, True)])
    with torch.no_grad():
        loss = model(**collate([conversation, pair], tiny.PAD, only_learnt=only_learnt)).loss
        terms = []
        for one in (conversation, pair):
            logits = model(torch.tensor([one.ids])).logits[0, :-1]
            each = cross_entropy(logits, torch.tensor(one.ids[1:]), reduction="none")
            terms.append(each[torch.tensor(one.is_learnt[1:])])
    assert float(loss) == pytest.approx(float(torch.cat(terms).mean()), rel=1e-5)


@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from([0.5, 1.0, 2.0, 2.5]), st.integers(0, 9))
def test_each_epoch_has_every_example_once(num: int, batch_size: int, epochs: float, seed: int) -> None:
    examples = [Tokens([n] * (n % 7 + 1), [True] * (n % 7 + 1)) for n in range(num)]
    steps = steps_of(examples, batch_size, epochs, seed)
    per_epoch = -(-num // batch_size)
    assert len(steps) == max(1, round(epochs * per_epoch))
    for start in range(0, len(steps) - per_epoch + 1, per_epoch):
        seen = [one.ids[0] for batch in steps[start : start + per_epoch] for one in batch]
        assert sorted(seen) == list(range(num))
    assert steps_of(examples, batch_size, epochs, seed) == steps
