"""Where texts stand among a tokenizer's special tokens, alone and in pairs, as transformers encodes them."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer

_PROBE = "a"  # a text that no vocabulary is without, if only as an unknown token


class Filled(NamedTuple):
    """An input with its special tokens, and the segment that each of its tokens is of."""

    token_ids: Sequence[int]
    token_types: Sequence[int] | None = None  # None: all of the first


class Layout:
    """Special tokens, and places of texts between them."""

    def __init__(self, encoding: Encoding) -> None:
        """Of the tokenizer, of texts that have some tokens."""
        self._places: list[tuple[int | None, int, int]] = []  # the number of a text, a special token's id, a segment
        places = zip(encoding.sequence_ids, encoding.ids, encoding.type_ids, strict=True)
        for number, group in groupby(places, key=lambda place: place[0]):
            own = list(group)
            self._places += own if number is None else own[:1]

    @property
    def special_ids(self) -> list[int]:
        return [token_id for number, token_id, _ in self._places if number is None]

    @property
    def num_special(self) -> int:
        return len(self.special_ids)

    def filled(self, *texts: Sequence[int], has_types: bool = False) -> Filled:
        """With these texts, each the ids of its tokens, at their places."""
        token_ids: list[int] = []
        token_types: list[int] = []
        for number, token_id, segment in self._places:
            own = [token_id] if number is None else texts[number]
            token_ids.extend(own)
            if has_types:
                token_types.extend([segment] * len(own))
        return Filled(token_ids, token_types if has_types else None)


class Layouts(NamedTuple):
    """How a tokenizer lays out one text, and two."""

    single: Layout
    pair: Layout


@lru_cache(maxsize=1)
def layouts_of(tokenizer: Tokenizer) -> Layouts:
    """Those of the tokenizer's own post-processor."""
    return Layouts(Layout(tokenizer.encode(_PROBE)), Layout(tokenizer.encode(_PROBE, _PROBE)))


def kept_of_pair(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens are kept of two texts of so many, by transformers' `longest_first`: the longer gives first."""
    if first + second <= room:
        return first, second
    shorter = min(first, second, room // 2)
    return (room - shorter, shorter) if first > second else (shorter, room - shorter)
