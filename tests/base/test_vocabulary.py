"""The bytes of each token, for every kind of tokenizer; and names by which two tokens can be told apart."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from swaplora_server.base.vocabulary import Vocabulary, named
from tokenizer_kinds import KINDS

VOCABULARIES = {kind: Vocabulary(tokenizer) for kind, tokenizer in KINDS.items()}


def token(kind: str, piece: str) -> int:
    token_id = KINDS[kind].token_to_id(piece)
    assert token_id is not None
    return int(token_id)


@pytest.mark.parametrize(
    ("kind", "piece", "data"),
    [
        ("byte_level", "ðŁ", [240, 159]),
        ("byte_level", "Ġâ", [32, 0xE2]),
        ("byte_level", "Ġab", b" ab"),
        ("byte_level", "Ċ", b"\n"),
        ("byte_level", "<|end|>", b"<|end|>"),
        ("byte_level", "aé", "aé".encode()),
        ("byte_fallback", "<0xF0>", [240]),
        ("byte_fallback", "<0x0A>", b"\n"),
        ("byte_fallback", "▁a", b" a"),
        ("byte_fallback", "▁▁", b"  "),
        ("byte_fallback", "</s>", b"</s>"),
        ("gemma", "<0x9F>", [159]),
        ("gemma", "▁", b" "),
        ("metaspace", "▁b▁a", b" b a"),
        ("word_piece", "##ab", b"ab"),
        ("word_piece", "ab", b" ab"),
        ("word_piece", ".", b"."),
        ("words", "ab", b" ab"),
    ],
)
def test_the_bytes_of_a_token(kind: str, piece: str, data: bytes | list[int]) -> None:
    assert VOCABULARIES[kind].bytes_of(token(kind, piece)) == bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_adds_what_the_tokenizers_own_decoder_says(kind: str) -> None:
    tokenizer, vocabulary = KINDS[kind], VOCABULARIES[kind]
    before = token(kind, "a")
    for token_id in range(tokenizer.get_vocab_size()):
        for ids, data in (
            ([before, token_id], vocabulary.first_bytes_of(before) + vocabulary.bytes_of(token_id)),
            ([token_id], vocabulary.first_bytes_of(token_id)),
        ):
            text = tokenizer.decode(ids, skip_special_tokens=False)
            if "\ufffd" not in text:
                assert data.decode() == text


@pytest.mark.parametrize("kind", KINDS)
def test_an_id_beyond_the_tokenizers_own_adds_nothing(kind: str) -> None:
    beyond = KINDS[kind].get_vocab_size() + 5
    assert VOCABULARIES[kind].bytes_of(beyond) == VOCABULARIES[kind].first_bytes_of(beyond) == b""


def test_a_part_of_a_character_is_named_by_its_bytes() -> None:
    ids = [token("byte_level", piece) for piece in ("ðŁ", "Ġâ", "ĺĢ", "Ġab")]
    names = named(ids, VOCABULARIES["byte_level"])
    assert [names[token_id] for token_id in ids] == [r"\xf0\x9f", r" \xe2", r"\x98\x80", " ab"]


@given(st.sampled_from(sorted(KINDS)), st.data())
def test_two_tokens_have_two_names(kind: str, data: st.DataObject) -> None:
    tokenizer: Tokenizer = KINDS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 3), max_size=20))
    assert len(set(named(ids, VOCABULARIES[kind]).values())) == len(set(ids))


def test_of_two_tokens_with_one_text_each_has_its_piece_for_a_name() -> None:
    letter, byte = token("byte_fallback", "a"), token("byte_fallback", "<0x61>")
    assert named([letter, byte], VOCABULARIES["byte_fallback"]) == {letter: "a", byte: "<0x61>"}
    assert named([byte], VOCABULARIES["byte_fallback"]) == {byte: "a"}
