"""Patterns from untrusted configs, matched against module paths by PEFT's rules and within a bound of work."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import Any, TypeVar

from swaplora_adapters.config.patterns import Paths, TooMuchWorkError, Work, bits, parsed, pattern_complaint
from swaplora_adapters.errors import InvalidAdapterError
from swaplora_adapters.files.complaints import quoted

_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_END = parsed("$")
_DOT = parsed(r"\.")
_PATH_END = parsed(r"(.*\.)?")

Value = TypeVar("Value")


def check_pattern(field: str, pattern: str, is_part: bool = False) -> None:
    """Raise InvalidAdapterError, naming the config's field, unless `pattern` is one that a `Matcher` takes.

    `is_part`: PEFT puts something behind it, which would join the last of several alternatives.
    """
    complaint = pattern_complaint(pattern)
    if is_part and not complaint and parsed(f"{pattern}()")[-1][0] != parsed("()")[0][0]:
        complaint = "must have its alternatives in a group"
    if complaint:
        raise InvalidAdapterError([f"{field}: the pattern {quoted(pattern)} {complaint}"])


class Matcher:
    """Matches patterns that passed `check_pattern` against a base's paths, each pattern against all of them at once.

    Every method raises InvalidAdapterError, naming the config's field, when more than `max_work` would be done, which
    is the same for the same paths and calls at every time. None is without a bound, for what was let in before.
    """

    def __init__(self, paths: Iterable[str], max_work: int | None = None) -> None:
        self._work = Work(max_work)
        self._names = paths
        self._fullmatches: dict[str, int] = {}  # by pattern, the starts of the paths that match
        self._values: dict[str, Mapping[int, Any]] = {}  # by field, and by the bit of a path's start
        self._exact: dict[str, dict[str, Any]] = {}  # by field

    @cached_property
    def _paths(self) -> Paths:
        """Most configs have no pattern."""
        return Paths(list(dict.fromkeys(self._names)), self._work)

    def is_fullmatch(self, field: str, pattern: str, path: str) -> bool:
        """PEFT's rule for `target_modules` and `exclude_modules` given as a string."""
        if pattern not in self._fullmatches:
            with _naming(field):
                self._fullmatches[pattern] = self._paths.begins(parsed(pattern), self._paths.ends)
        return bool(self._fullmatches[pattern] >> self._paths.places[path] & 1)

    def value_for(self, field: str, patterns: Sequence[tuple[str, Value]], path: str, default: Value) -> Value:
        """PEFT's rule for `rank_pattern` and `alpha_pattern` (`peft.utils.other.get_pattern_key`).

        The first pattern, in the file's order, that matches the whole path or what follows one of its dots. A field
        always comes with the same `patterns`.
        """
        if not patterns:
            return default
        if field not in self._values:
            with _naming(field):
                self._values[field] = self._first_values(patterns)
        value: Value = self._values[field].get(self._paths.places[path], default)
        return value

    def _first_values(self, patterns: Sequence[tuple[str, Value]]) -> Mapping[int, Value]:
        values: dict[int, Value] = {}
        left = self._paths.starts
        for pattern, value in patterns:
            ends = self._paths.begins([*parsed(pattern), *_END], self._paths.everywhere)
            found = self._paths.begins(_PATH_END, ends) & left
            left &= ~found
            values |= dict.fromkeys(bits(found), value)
        return values

    def exact_value_for(self, field: str, values: Sequence[tuple[str, Value]], path: str, default: Value) -> Value:
        """The value given for exactly this path. A field always comes with the same `values`."""
        if field not in self._exact:
            self._exact[field] = dict(values)
        value: Value = self._exact[field].get(path, default)
        return value

    def layer_index(self, field: str, patterns: Sequence[str], path: str) -> int | None:
        """PEFT's rule for the number of the layer that `path` lies in; `patterns` may name the list of layers.

        Also raises InvalidAdapterError for a pattern that fits before several numbers: which of them is meant would
        hang on the order in which ways to match are tried.
        """
        if not patterns:
            found = _ANY_LAYER.match(path)
            return int(found["idx"]) if found else None
        with _naming(field):
            return next(
                (index for pattern in patterns if (index := self._index(field, pattern, path)) is not None), None
            )

    def _index(self, field: str, pattern: str, path: str) -> int | None:
        """The number behind the match that begins first, at the start of the path or behind one of its dots."""
        text = Paths([path], self._work)
        starts = text.begins(parsed(r"(?:^|(?<=\.))"), text.everywhere)
        first, index = 0, None
        for number in _NUMBER.finditer(path):
            begins = text.begins([*parsed(pattern), *_DOT], 1 << len(path) - number.start()) & starts
            if begins and begins.bit_length() == first:
                raise InvalidAdapterError(
                    [f"{field}: the pattern {quoted(pattern)} fits several numbers in {quoted(path)}"]
                )
            if begins.bit_length() > first:
                first, index = begins.bit_length(), int(number[0])
        return index


@contextmanager
def _naming(field: str) -> Iterator[None]:
    try:
        yield
    except TooMuchWorkError:
        raise InvalidAdapterError([f"{field}: its patterns are too much work to match, name the modules"]) from None


@lru_cache(maxsize=1 << 14)
def path_ends(module: str) -> frozenset[str]:
    """The whole path, and what follows each of its dots; of a module or parameter of a base, all of which are few."""
    parts = module.split(".")
    return frozenset(".".join(parts[first:]) for first in range(len(parts)))
