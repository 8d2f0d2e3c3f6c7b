"""Regular expressions from untrusted configs, matched against all module paths at once and without backtracking.

Python's own parser reads a pattern, so that it means what it means to PEFT; what is not regular is refused. It is run
from its end to its start over all paths laid side by side, with one bit for each position of each path: every part of
it turns the positions where the rest may begin into those where the part may, for all paths in a few operations on long
integers (Cameron et al., "Bitwise Data Parallelism in Regular Expression Matching", 2014). How much work that is does
not depend on how fast the machine is, so that a bound on it decides the same at every time.
"""

from collections.abc import Callable, Iterator, Sequence
from re import _constants as sre
from re import _parser, error
from typing import Any

MAX_PATTERN_CHARS = 2048
MAX_GROUPS = 96
MAX_WORK = 1 << 27  # words of long integers: about a second

_SENTINEL = "\0"  # stands at the start of each path, where no character is
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    sre.CATEGORY_DIGIT: str.isdecimal,
    sre.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    sre.CATEGORY_WORD: lambda char: _is_word(char),
    sre.CATEGORY_NOT_WORD: lambda char: not _is_word(char),
}
_REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT)
_SINGLES = (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN)
_REGULAR = (*_REPEATS, *_SINGLES, sre.BRANCH, sre.SUBPATTERN, sre.AT, sre.ASSERT, sre.ASSERT_NOT, sre.FAILURE)

_NOT_REGULAR = (
    "uses syntax that is not supported: flags, back references, repeats that give nothing back, "
    "or a lookbehind of no one length"
)

Items = Sequence[tuple[Any, Any]]  # of Python's parser: what follows one another


class TooMuchWorkError(Exception):
    """The bound is spent."""


class Work:
    """What may still be done, in words of long integers; None is without a bound."""

    def __init__(self, bound: int | None = None) -> None:
        self._left = bound

    def spend(self, num_words: int) -> None:
        """Raises TooMuchWorkError."""
        if self._left is not None:
            self._left -= num_words
            if self._left < 0:
                raise TooMuchWorkError


def pattern_complaint(pattern: str) -> str | None:
    """Why `pattern` cannot be used, or None."""
    if not pattern or len(pattern) > MAX_PATTERN_CHARS:
        return f"must have 1 to {MAX_PATTERN_CHARS} characters"
    if pattern.count("(") > MAX_GROUPS:
        return f"must have at most {MAX_GROUPS} groups"
    try:
        items = _parser.parse(pattern)
    except (error, OverflowError) as complaint:
        return f"is no regular expression: {complaint}"
    has_flags, is_pefts_name = items.state.flags != sre.SRE_FLAG_UNICODE, "idx" in items.state.groupdict
    return None if not has_flags and not is_pefts_name and _is_regular(items) else _NOT_REGULAR


def _is_regular(items: Items) -> bool:
    return all(
        _is_allowed(operator, given) and all(map(_is_regular, _inner(operator, given))) for operator, given in items
    )


def _is_allowed(operator: Any, given: Any) -> bool:
    """Python's own compiler wants what a lookbehind matches to be of one length."""
    if operator in (sre.ASSERT, sre.ASSERT_NOT) and given[0] < 0:
        shortest, longest = given[1].getwidth()
        return bool(shortest == longest)
    has_flags = operator is sre.SUBPATTERN and (given[1] or given[2])
    return operator in _REGULAR and not has_flags


def _inner(operator: Any, given: Any) -> Sequence[Items]:
    """The parts that an operator works on."""
    if operator in _REPEATS:
        return [given[2]]
    if operator is sre.BRANCH:
        branches: Sequence[Items] = given[1]
        return branches
    if operator is sre.SUBPATTERN:
        return [given[3]]
    return [given[1]] if operator in (sre.ASSERT, sre.ASSERT_NOT) else []


def parsed(pattern: str) -> Items:
    """What Python's parser makes of a pattern that has no `pattern_complaint`."""
    items: Items = _parser.parse(pattern)
    return items


class Paths:
    """Module paths to be matched together, none of which holds a line break."""

    def __init__(self, paths: Sequence[str], work: Work) -> None:
        self._text = "".join(path[::-1] + _SENTINEL for path in paths)[::-1]  # the first position is the last char
        self._chars = frozenset(self._text) - {_SENTINEL}
        self._work = work
        self._cost = 64 + len(self._text) // 64  # of one operation, in words
        self._longest = max(map(len, paths), default=0)
        self._masks: dict[object, int] = {}
        self.everywhere = (1 << len(self._text)) - 1
        self.starts = self._positions({_SENTINEL})
        self.ends = (self.starts << 1 | 1) & self.everywhere
        self.places = dict(zip(paths, bits(self.starts), strict=True))  # the bit of each path's start
        word = self._positions(set(filter(_is_word, self._chars)))
        self._boundaries = (word ^ word << 1) & self.everywhere

    def begins(self, items: Items, ends: int) -> int:
        """The positions at which a match can begin that ends at one of `ends`; TooMuchWorkError."""
        for operator, given in reversed(items):
            if not ends:
                return 0
            ends = self._before(operator, given, ends)
        return ends

    def _before(self, operator: Any, given: Any, ends: int) -> int:
        self._work.spend(self._cost)
        if operator in _SINGLES:
            return (ends & self._mask(operator, given)) << 1
        if operator in _REPEATS:
            least, most, inner = given
            return self._repeated(least, most, inner, ends)
        if operator is sre.BRANCH:
            return self._any([self.begins(branch, ends) for branch in given[1]])
        if operator is sre.SUBPATTERN:
            return self.begins(given[3], ends)
        if operator is sre.AT:
            return ends & self._anchors(given)
        if operator is sre.FAILURE:
            return 0
        found = self._around(*given)
        return ends & (found if operator is sre.ASSERT else ~found)

    def _repeated(self, least: int, most: int, items: Items, ends: int) -> int:
        """A path has no more positions than `_longest` + 1, after as many repeats nothing changes."""
        items = _ungrouped(items)
        for _ in range(min(least, self._longest + 1)):
            ends = self.begins(items, ends)
        if most is sre.MAXREPEAT and len(items) == 1 and items[0][0] in _SINGLES:
            run = self._mask(*items[0])
            return (((ends & run) + run) ^ run) | ends  # the carry runs through each run to its end
        new, left = ends, most - least
        while new and left:
            new = self.begins(items, new) & ~ends
            ends |= new
            left -= 1
        return ends

    def _around(self, direction: int, items: Any) -> int:
        """Where a lookahead holds, or a lookbehind, all of whose matches are of one length."""
        begins = self.begins(items, self.everywhere)
        return begins if direction > 0 else begins >> items.getwidth()[0]

    def _anchors(self, anchor: Any) -> int:
        if anchor in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
            return self.starts
        if anchor in (sre.AT_END, sre.AT_END_STRING):
            return self.ends
        return self._boundaries if anchor is sre.AT_BOUNDARY else self.everywhere & ~self._boundaries

    def _mask(self, operator: Any, given: Any) -> int:
        """The positions before which stands a character of this set."""
        key = (operator, tuple(given) if operator is sre.IN else given)
        if key not in self._masks:
            self._work.spend(self._cost)
            self._masks[key] = self._positions({char for char in self._chars if _is_in(char, operator, given)})
        return self._masks[key]

    def _positions(self, chars: set[str]) -> int:
        digits = {ord(char): "01"[char in chars] for char in (*self._chars, _SENTINEL)}
        return int(self._text.translate(digits) or "0", 2)

    def _any(self, found: Sequence[int]) -> int:
        result = 0
        for positions in found:
            result |= positions
        return result


def bits(positions: int) -> Iterator[int]:
    """The numbers of the bits that are set, the least first."""
    digits = bin(positions)[:1:-1]
    place = digits.find("1")
    while place >= 0:
        yield place
        place = digits.find("1", place + 1)


def _ungrouped(items: Items) -> Items:
    while len(items) == 1 and items[0][0] is sre.SUBPATTERN:
        items = items[0][1][3]
    return items


def _is_in(char: str, operator: Any, given: Any) -> bool:
    if operator is sre.ANY:
        return char != "\n"
    if operator is not sre.IN:
        return (ord(char) == given) is (operator is sre.LITERAL)
    is_negated = given[0][0] is sre.NEGATE
    return any(_is_member(char, kind, value) for kind, value in given[is_negated:]) is not is_negated


def _is_member(char: str, kind: Any, value: Any) -> bool:
    if kind is sre.CATEGORY:
        return _CATEGORIES[value](char)
    low, high = value if kind is sre.RANGE else (value, value)
    return bool(low <= ord(char) <= high)


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"
