"""Text as it grows: what all ids decode to, cut where a stop string begins, nothing lost and nothing said twice."""

import codecs
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import tiny
from swaplora_server.base.vocabulary import Vocabulary
from swaplora_server.engine.request import Logprobs, SamplingParams
from swaplora_server.service import detokenize
from swaplora_server.service.detokenize import Detokenizer, TextRules, TextToken
from tokenizer_kinds import KINDS, SPECIAL

TOKENIZER = tiny.byte_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER.backend_tokenizer)
VOCABULARIES = {kind: Vocabulary(tokenizer) for kind, tokenizer in KINDS.items()}
CHOSEN = Logprobs(-1.0, ())


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def detokenizer(*stop: str, min_tokens: int = 0, **options: Any) -> Detokenizer:
    params = SamplingParams(max_tokens=100, min_tokens=min_tokens)
    return Detokenizer(TextRules(VOCABULARY, stop, params.may_end_at, **options))


def token(kind: str, piece: str) -> int:
    token_id = KINDS[kind].token_to_id(piece)
    assert token_id is not None
    return int(token_id)


def said(stream: Detokenizer, tokens: Sequence[int]) -> tuple[list[str], list[TextToken]]:
    """The pieces that come, until it stops, and the tokens they are said to be made of."""
    pieces: list[str] = []
    made_of: list[TextToken] = []
    for token_id in tokens:
        settled = stream.push(token_id, CHOSEN)
        pieces.append(settled.text)
        made_of += settled.tokens
        if stream.is_stopped:
            return pieces, made_of
    settled = stream.flush()
    return [*pieces, settled.text], [*made_of, *settled.tokens]


def joined(tokens: list[TextToken]) -> str:
    return b"".join(token.data for token in tokens).decode(errors="replace")


@st.composite
def kinds_and_ids(draw: st.DrawFn) -> tuple[str, list[int], list[int]]:
    """A kind of tokenizer, a prompt and what follows; unknown ids, and many parts of something."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    size = KINDS[kind].get_vocab_size()
    pieces = ["a", "▁a", "▁", "ðŁ", "ĺĢ", "Ġâ", "Ĥ¬", "aÃ", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<0x20>", "##a"]
    known = [token_id for piece in [*pieces, *SPECIAL] if (token_id := KINDS[kind].token_to_id(piece)) is not None]
    token_ids = st.lists(st.sampled_from(known) | st.integers(0, size + 1), max_size=12)
    return kind, draw(token_ids), draw(token_ids)


@given(kinds_and_ids(), st.booleans())
def test_prompt_and_text_are_what_all_ids_decode_to(drawn: tuple[str, list[int], list[int]], skips: bool) -> None:
    kind, prompt, generated = drawn
    tokenizer: Tokenizer = KINDS[kind]
    rules = TextRules(VOCABULARIES[kind], skip_special_tokens=skips)
    pieces, tokens = said(Detokenizer(rules, prompt), generated)
    begun = tokenizer.decode(prompt, skip_special_tokens=skips)
    whole = tokenizer.decode(prompt + generated, skip_special_tokens=skips)
    # the libraries' decoders make U+FFFD of a whole run of bytes, or of a name, where a part of it is no character
    if "\ufffd" not in whole and not begun.endswith("\ufffd"):
        assert begun + "".join(pieces) == whole
    if not begun.endswith("\ufffd"):
        assert joined(tokens) == "".join(pieces)
    assert [token.token_id for token in tokens] == generated


@given(st.lists(st.integers(0, 255) | st.sampled_from([0xF0, 0x9F, 0x98, 0x80, 0xE2, 0xC3]), max_size=12))
def test_bytes_that_are_no_character_are_replaced_as_unicode_recommends(data: list[int]) -> None:
    for kind in ("byte_level", "byte_fallback", "gemma"):
        of_byte = {VOCABULARIES[kind].bytes_of(token_id): token_id for token_id in reversed(range(260))}
        prompt = [token(kind, "a")]
        pieces, _ = said(Detokenizer(TextRules(VOCABULARIES[kind]), prompt), [of_byte[bytes([byte])] for byte in data])
        assert "".join(pieces) == bytes(data).decode(errors="replace")


STOPS = st.lists(
    st.lists(st.sampled_from(["a", "b", " ", "é", "€", "\ufffd", "</s>", "<|end|>"]), min_size=1, max_size=3).map(
        "".join
    ),
    max_size=3,
)


def shown_length(kind: str, prompt: list[int], generated: list[int], stops: list[str], min_tokens: int) -> int | None:
    """Characters before the first stop string that is complete, by looking at all that there is after each token."""
    vocabulary = VOCABULARIES[kind]
    whole = Detokenizer(TextRules(vocabulary, ["no such text"], skip_special_tokens=True), prompt)
    units: list[str | int] = []
    for number, token_id in enumerate(generated, start=1):
        whole._finder = None  # noqa: SLF001 - text as it comes, nothing held
        is_named = any(vocabulary.special.get(token_id, "\0") in stop for stop in stops)
        before = len(units)
        if is_named and whole._pending:  # noqa: SLF001
            units += whole._decode(b"", is_last=True)  # noqa: SLF001
        units += whole.push(token_id).text
        units += [token_id] if token_id in vocabulary.special else []
        if number > min_tokens and (length := _first_stop(vocabulary, units, before, stops)) is not None:
            return length
    before = len(units)
    units += whole.flush().text
    return _first_stop(vocabulary, units, before, stops) if len(generated) > min_tokens else None


def _first_stop(vocabulary: Vocabulary, units: list[str | int], before: int, stops: list[str]) -> int | None:
    for end in range(before + 1, len(units) + 1):
        beginnings = []
        for stop in stops:
            for sought in ([*stop], _with_ids(vocabulary, stop)):
                seen = [unit for unit in units[:end] if isinstance(unit, str) or unit in sought]
                if seen and seen[-1] == units[end - 1] and seen[-len(sought) :] == sought:
                    num_shown = sum(isinstance(unit, str) for unit in units[:end])
                    beginnings.append(num_shown - sum(isinstance(unit, str) for unit in sought))
        if beginnings:
            return min(beginnings)
    return None


def _with_ids(vocabulary: Vocabulary, stop: str) -> list[str | int]:
    units: list[str | int] = []
    while stop:
        found = next(((i, name) for i, name in vocabulary.special.items() if stop.startswith(name)), None)
        units.append(found[0] if found else stop[0])
        stop = stop[len(found[1]) if found else 1 :]
    return units


@given(kinds_and_ids(), STOPS, st.integers(0, 4))
def test_the_text_ends_before_the_first_stop_string(
    drawn: tuple[str, list[int], list[int]], stops: list[str], min_tokens: int
) -> None:
    kind, prompt, generated = drawn
    params = SamplingParams(max_tokens=100, min_tokens=min_tokens)
    stream = Detokenizer(TextRules(VOCABULARIES[kind], stops, params.may_end_at), prompt)
    pieces, tokens = said(stream, generated)
    text = "".join(pieces)
    length = shown_length(kind, prompt, generated, stops, min_tokens)
    assert stream.is_stopped == (length is not None)
    if length is not None:
        assert len(text) == length
    named = any(VOCABULARIES[kind].special.get(token_id, "\0") in stop for stop in stops for token_id in generated)
    if not named:
        everything = "".join(said(Detokenizer(TextRules(VOCABULARIES[kind]), prompt), generated)[0])
        assert text == everything[:length]
        if not KINDS[kind].decode(prompt).endswith("\ufffd"):
            assert joined(tokens) == text
    assert [token.token_id for token in tokens] == generated[: len(tokens)]


@given(st.text(alphabet="abé€😀 \n", max_size=40))
def test_pieces_add_up_to_the_text(text: str) -> None:
    pieces, tokens = said(detokenizer(), ids(text))
    assert "".join(pieces) == joined(tokens) == text


@given(st.text(alphabet="abc", max_size=30), st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3))
def test_a_stop_string_cuts_where_it_begins_and_is_never_leaked(text: str, stops: list[str]) -> None:
    stream = detokenizer(*stops)
    pieces, tokens = said(stream, ids(text))
    # the first moment at which any stop string is complete decides, and there the earliest beginning
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    seen = text[: ends[0]] if ends else text
    assert "".join(pieces) == seen[: min((seen.find(stop) for stop in stops if stop in seen), default=len(seen))]
    assert joined(tokens) == "".join(pieces)
    assert stream.is_stopped == bool(ends)


@given(st.data())
def test_steps_do_not_matter(data: st.DataObject) -> None:
    """The same text in tokens of other lengths stops at the same place."""
    of_bytes: dict[bytes, list[int]] = {}
    for token_id in range(KINDS["byte_level"].get_vocab_size()):
        of_bytes.setdefault(VOCABULARIES["byte_level"].bytes_of(token_id), []).append(token_id)
    text = data.draw(st.text(alphabet="ab €😀", max_size=12)).encode()
    stops = data.draw(st.lists(st.text(alphabet="ab €😀", min_size=1, max_size=3), max_size=3))
    texts = set()
    for _ in range(3):
        tokens, rest = [], text
        while rest:
            whole = data.draw(st.sampled_from([piece for piece in of_bytes if piece and rest.startswith(piece)]))
            tokens.append(of_bytes[whole][0])
            rest = rest[len(whole) :]
        pieces, made_of = said(Detokenizer(TextRules(VOCABULARIES["byte_level"], stops)), tokens)
        assert joined(made_of) == "".join(pieces)
        texts.add("".join(pieces))
    assert len(texts) == 1


def test_a_stop_string_can_be_kept() -> None:
    stream = detokenizer("END", include_stop=True)
    pieces, tokens = said(stream, ids("the END of it"))
    assert "".join(pieces) == joined(tokens) == "the END"
    assert stream.is_stopped


def test_text_after_a_stop_string_in_one_token_is_cut_with_it() -> None:
    vocabulary, prompt = VOCABULARIES["byte_fallback"], [token("byte_fallback", "a")]
    tokens = [token("byte_fallback", piece) for piece in ("b", "aab", "ab")]
    for include, text, data in ((False, "ba", [b"b", b"a"]), (True, "baab", [b"b", b"aab"])):
        stream = Detokenizer(TextRules(vocabulary, ["ab"], include_stop=include), prompt)
        pieces, made_of = said(stream, tokens)
        assert "".join(pieces) == text
        assert [token.data for token in made_of] == data


@pytest.mark.parametrize("text", ["é", "€", "😀"])
def test_a_character_is_said_when_it_is_whole(text: str) -> None:
    stream = detokenizer()
    pieces = [stream.push(token).text for token in ids(text)]
    assert pieces == [""] * (len(pieces) - 1) + [text]


def test_a_character_cut_short_shows_as_such() -> None:
    stream = detokenizer()
    assert stream.push(ids("€")[0]).text == ""
    assert stream.flush().text == "�"


def test_a_character_that_the_prompt_leaves_incomplete() -> None:
    first, *rest = ids("€")
    completing = Detokenizer(TextRules(VOCABULARY), [*ids("a"), first])
    assert "".join(said(completing, [*rest, *ids("b")])[0]) == "€b"
    breaking = Detokenizer(TextRules(VOCABULARY), [*ids("a"), first])
    assert "".join(said(breaking, ids("b"))[0]) == "b"


def test_special_tokens_are_shown_only_when_wanted() -> None:
    assert detokenizer().push(tiny.EOS).text == ""
    assert detokenizer(skip_special_tokens=False).push(tiny.EOS).text == "<|eos|>"


@pytest.mark.parametrize("options", [{}, {"skip_special_tokens": False}])
@pytest.mark.parametrize("stop", ["<|eos|>", "b<|eos|>", "<|pad|><|eos|>"])
def test_a_stop_string_may_be_the_text_of_a_special_token(stop: str, options: dict[str, bool]) -> None:
    tokens = [*ids("ab"), tiny.PAD, tiny.EOS, *ids("c")] if "pad" in stop else [*ids("ab"), tiny.EOS, *ids("c")]
    stream = detokenizer(stop, **options)
    pieces, made_of = said(stream, tokens)
    assert ("".join(pieces), stream.is_stopped) == ("a" if stop.startswith("b") else "ab", True)
    assert joined(made_of) == "".join(pieces)
    assert [token.token_id for token in made_of] == ids("".join(pieces))


def test_a_special_token_in_a_stop_string_can_be_kept() -> None:
    for options in ({}, {"skip_special_tokens": False}):
        stream = detokenizer("b<|eos|>", include_stop=True, **options)
        pieces, made_of = said(stream, [*ids("ab"), tiny.EOS, *ids("c")])
        assert "".join(pieces) == joined(made_of) == "ab<|eos|>"


def test_a_part_of_a_hidden_name_stops_nothing() -> None:
    stream = detokenizer("eos", "|", "x<|pad|>")
    pieces, _ = said(stream, [*ids("a"), tiny.EOS, tiny.PAD, *ids("b")])
    assert ("".join(pieces), stream.is_stopped) == ("ab", False)


def test_hidden_tokens_do_not_part_a_stop_string() -> None:
    stream = detokenizer("ab", "z<|pad|>")
    pieces, _ = said(stream, [*ids("xa"), tiny.PAD, *ids("by")])
    assert ("".join(pieces), stream.is_stopped) == ("x", True)


def test_a_stop_string_among_the_first_tokens_is_held_back() -> None:
    """As stop tokens are: none of the first `min_tokens` tokens ends anything."""
    text = "ab--ab"
    for min_tokens, said_text in ((0, ""), (1, ""), (2, "ab--"), (5, "ab--"), (6, "ab--ab")):
        pieces, _ = said(detokenizer("ab", min_tokens=min_tokens), ids(text))
        assert "".join(pieces) == said_text


def test_endless_incomplete_bytes_cost_the_same_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is counted: the bytes that the decoder is given, and those that it keeps for later."""
    work = 0

    class Counting(codecs.BufferedIncrementalDecoder):
        def _buffer_decode(self, data: Any, errors: str, final: bool) -> tuple[str, int]:
            nonlocal work
            work += len(data)
            return codecs.utf_8_decode(data, errors, final)

    monkeypatch.setattr(detokenize, "_Utf8Decoder", Counting)
    for kind, piece in (("byte_level", "ðŁ"), ("byte_fallback", "<0xF0>"), ("gemma", "<0x9F>"), ("byte_level", "ĺĢ")):
        for stops in ([], ["\ufffd\ufffdx"]):
            token_id = token(kind, piece)
            stream, work = Detokenizer(TextRules(VOCABULARIES[kind], stops)), 0
            length = sum(len(stream.push(token_id, CHOSEN).text) for _ in range(5000)) + len(stream.flush().text)
            assert length >= 5000
            assert work <= 6 * 5000
            assert len(stream._held) <= 3  # noqa: SLF001
