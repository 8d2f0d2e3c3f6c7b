"""Where a text must stop: strings looked for as it grows, over the borders of tokens, in time that is linear."""

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Unit = str | int  # a character, or the id of a special token that the text does not show


class StopStrings:
    """The strings that end a text. Special tokens that are not shown are found by their names in these strings."""

    def __init__(self, strings: Sequence[str], hidden: Mapping[int, str]) -> None:
        """hidden: the name of each special token that the text leaves out."""
        self.patterns = [_Pattern(string, string) for string in strings]
        self.token_ids: set[int] = set()  # of the hidden that have their names in a string
        for string in strings:
            if names := {name: token_id for token_id, name in hidden.items() if name in string}:
                self.patterns.append(_Pattern(string, _units(string, names)))
                self.token_ids.update(self.patterns[-1].hidden)


class Match(NamedTuple):
    """A stop string that is complete after `end` of the units that were read last."""

    end: int
    text: str
    length: int  # of what the text shows of it
    hidden: tuple[int, ...]  # the special tokens in it


class StopFinder:
    """Looks for the stop strings of one text. The first that is complete counts, of several at once the longest."""

    def __init__(self, stops: StopStrings) -> None:
        self._patterns = stops.patterns
        self._matched = [0] * len(stops.patterns)  # units of each that the text so far ends with

    @property
    def num_held(self) -> int:
        """Characters at the end of the text that may still turn out to belong to a stop string."""
        return max(map(_Pattern.num_shown, self._patterns, self._matched))

    @property
    def is_holding_tokens(self) -> bool:
        """Whether hidden tokens that came may still turn out to belong to a stop string."""
        return any(map(_Pattern.has_hidden, self._patterns, self._matched))

    def read(self, units: Sequence[Unit], *, may_stop: bool) -> Match | None:
        """The text goes on with `units`. What is complete while it may not stop yet does not count."""
        found: Match | None = None
        for place, pattern in enumerate(self._patterns):
            matched, end = pattern.read(self._matched[place], units)
            while end is not None and not may_stop:
                matched, end = pattern.read(pattern.border, units, end)
            self._matched[place] = matched
            if end is not None:
                match = Match(end, pattern.text, pattern.num_shown(matched), pattern.hidden)
                if found is None or (end, -match.length) < (found.end, -found.length):
                    found = match
        return found


class _Pattern:
    """One string as units to look for, after Knuth, Morris and Pratt; its table grows only as far as it matches."""

    def __init__(self, text: str, units: Sequence[Unit]) -> None:
        self.text = text
        self._units = units
        self.hidden = () if isinstance(units, str) else tuple(unit for unit in units if isinstance(unit, int))
        self._hidden_at = [place for place, unit in enumerate(units) if isinstance(unit, int)] if self.hidden else []
        self._borders = [0, 0]  # for each length of its beginning, the longest shorter one that this ends with

    @property
    def border(self) -> int:
        """What is still matched when the whole was and does not count."""
        return self._borders[len(self._units)]

    def num_shown(self, length: int) -> int:
        """How many of its first `length` units are characters."""
        return length - bisect_left(self._hidden_at, length)

    def has_hidden(self, length: int) -> bool:
        """Whether special tokens are among its first `length` units."""
        return self.num_shown(length) < length

    def read(self, matched: int, units: Sequence[Unit], start: int = 0) -> tuple[int, int | None]:
        """How much of it is matched after `units[start:]`, and None; or the whole, and where that ends."""
        own, borders = self._units, self._borders
        if matched == 0 and isinstance(units, str) and not self._may_begin_in(units):
            return 0, None
        for place in range(start, len(units)):
            unit = units[place]
            if isinstance(unit, int) and unit not in self.hidden:
                continue  # who does not see it does not see the text parted by it
            while matched and own[matched] != unit:
                matched = borders[matched]
            if own[matched] == unit:
                matched += 1
                if matched == len(borders):
                    borders.append(self._next_border())
                if matched == len(own):
                    return matched, place + 1
        return matched, None

    def _may_begin_in(self, text: str) -> bool:
        first = self._units[0]
        return isinstance(first, str) and first in text

    def _next_border(self) -> int:
        own, border = self._units, self._borders[-1]
        unit = own[len(self._borders) - 1]
        while border and own[border] != unit:
            border = self._borders[border]
        return border + 1 if own[border] == unit else 0


def _units(string: str, names: Mapping[str, int]) -> list[Unit]:
    """Its characters, with an id for each name of a special token in it; of names that overlap, the longest."""
    either = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    units: list[Unit] = []
    for part in re.split(f"({either})", string):
        units += [names[part]] if part in names else part
    return units
