"""What each token is as bytes: some hold a part of a character, which no text can say."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import Decoder
from tokenizers.pre_tokenizers import ByteLevel

_ANCHOR = "x"  # a piece for others to stand beside


class Vocabulary:
    """The bytes that each token of a tokenizer adds to a text.

    The tokenizer's own decoder is asked how it writes a piece between others. Only bytes are read from the piece here:
    of those that are no whole character it would make U+FFFD. Ids that it does not know add nothing.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self.special = {token_id: token.content for token_id, token in added.items() if token.special}
        self.piece: Callable[[int], str | None] = tokenizer.id_to_token
        self._added = added.keys()
        self._write: Callable[[list[str]], str] = tokenizer.decoder.decode if tokenizer.decoder else " ".join
        self._raw_bytes = _reader(tokenizer.decoder)
        self._before = self._write([_ANCHOR])
        self._after = self._write([_ANCHOR, _ANCHOR]).removeprefix(self._before)
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """What it adds after other tokens. Of a special token, its name."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._between(token_id)
        return known

    def first_bytes_of(self, token_id: int) -> bytes:
        """What it adds where a text begins, which some tokenizers do without a space."""
        piece = self.piece(token_id)
        if piece is None:
            return b""
        raw = self._raw(token_id, piece)
        if raw is None:
            return self._write([piece, _ANCHOR]).removesuffix(self._after).encode()
        return raw if self._write([piece]) else b""

    def text_of(self, token_ids: Iterable[int]) -> str:
        """What they are together, special tokens by their names; bytes that are no character show as U+FFFD."""
        known = [token_id for token_id in token_ids if self.piece(token_id) is not None]
        first = map(self.first_bytes_of, known[:1])
        return b"".join([*first, *map(self.bytes_of, known[1:])]).decode(errors="replace")

    def pieces(self, token_ids: Iterable[int]) -> list[str]:
        """The tokenizer's own spelling of each; of one that it does not know, nothing."""
        return [self.piece(token_id) or "" for token_id in token_ids]

    def _between(self, token_id: int) -> bytes:
        piece = self.piece(token_id)
        if piece is None:
            return b""
        raw = self._raw(token_id, piece)
        if raw is None:
            written = self._write([_ANCHOR, piece, _ANCHOR])
            return written.removeprefix(self._before).removesuffix(self._after).encode()
        return raw

    def _raw(self, token_id: int, piece: str) -> bytes | None:
        raw = self._raw_bytes(piece)
        if raw is not None and len(piece) > 1 and token_id in self._added and not _is_text(raw):
            return piece.encode()  # a name that somebody gave, which only happens to be spelled in letters for bytes
        return raw


def named(ids: Iterable[int], vocabulary: Vocabulary) -> dict[int, str]:
    """A name for each of some tokens: its text, with a part of a character as `\\xf0\\x9f`.

    Where several have one text they are named by their pieces, and those without a piece by their ids.
    """
    pieces = {token_id: vocabulary.piece(token_id) or f"token_id:{token_id}" for token_id in ids}
    texts = {token_id: shown(vocabulary.bytes_of(token_id)) for token_id in pieces}
    alike = Counter(texts.values())
    return {token_id: text if text and alike[text] == 1 else pieces[token_id] for token_id, text in texts.items()}


def shown(data: bytes) -> str:
    r"""Bytes as text, with those that are no character as `\xf0`, which is how OpenAI's chat names such tokens."""
    return data.decode(errors="backslashreplace")


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _reader(decoder: Decoder | None) -> Callable[[str], bytes | None]:
    """A function from a piece to the bytes that it spells, where the decoder takes it to spell bytes."""
    kinds = set(_kinds(json.loads(decoder.__getstate__()))) if decoder else set()
    if "ByteLevel" in kinds:
        return _byte_level
    return _byte_fallback if "ByteFallback" in kinds else lambda _piece: None


def _kinds(decoder: dict[str, Any]) -> Iterable[str]:
    yield decoder["type"]
    for part in decoder.get("decoders", ()):
        yield from _kinds(part)


def _byte_level(piece: str) -> bytes:
    letters = _letters()
    return bytes(map(letters.__getitem__, piece)) if letters.keys() >= set(piece) else piece.encode()


def _byte_fallback(piece: str) -> bytes | None:
    """The byte in `<0x0A>`."""
    if len(piece) != len("<0x0A>") or not (piece.startswith("<0x") and piece.endswith(">")):
        return None
    try:
        return bytes.fromhex(piece[3:5])
    except ValueError:
        return None


@cache
def _letters() -> dict[str, int]:
    """The letter that stands for each byte in GPT-2's alphabet: printable ones for themselves, the rest from 256 up."""
    own = [byte for byte in range(256) if chr(byte) in ByteLevel.alphabet()]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(others)}
