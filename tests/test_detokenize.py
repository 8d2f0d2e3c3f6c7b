"""Text as it grows: whole characters only, stop strings cut where they begin, nothing lost and nothing said twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from swaplora_server.engine.detokenize import Detokenizer

TOKENIZER = tiny.byte_tokenizer()


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def detokenizer(*stop: str, **options: bool) -> Detokenizer:
    return Detokenizer(TOKENIZER.backend_tokenizer, stop=stop, **options)


@given(st.text(alphabet="abcé€😀 \n", max_size=40))
def test_pieces_add_up_to_the_text(text: str) -> None:
    stream = detokenizer()
    assert "".join(stream.push(token) for token in ids(text)) + stream.flush() == text


@given(st.text(alphabet="abc", max_size=30), st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3))
def test_a_stop_string_cuts_where_it_begins_and_is_never_leaked(text: str, stops: list[str]) -> None:
    stream = detokenizer(*stops)
    said = ""
    for token in ids(text):
        said += stream.push(token)
        if stream.is_stopped:
            break
    said += stream.flush()
    # the first moment at which any stop string is complete decides, and there the earliest beginning
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert said == text
        assert not stream.is_stopped
    else:
        seen = text[: ends[0]]
        assert said == seen[: min(seen.find(stop) for stop in stops if stop in seen)]
        assert stream.is_stopped


def test_a_stop_string_can_be_kept() -> None:
    stream = detokenizer("END", include_stop=True)
    assert "".join(stream.push(token) for token in ids("the END")) == "the END"
    assert stream.is_stopped


@pytest.mark.parametrize("text", ["é", "€", "😀"])
def test_a_character_is_said_when_it_is_whole(text: str) -> None:
    stream = detokenizer()
    pieces = [stream.push(token) for token in ids(text)]
    assert pieces == [""] * (len(pieces) - 1) + [text]


def test_a_character_cut_short_shows_as_such() -> None:
    stream = detokenizer()
    assert stream.push(ids("€")[0]) == ""
    assert stream.flush() == "�"


def test_special_tokens_are_shown_only_when_wanted() -> None:
    assert detokenizer().push(tiny.EOS) == ""
    assert detokenizer(skip_special_tokens=False).push(tiny.EOS) == "<|eos|>"
