"""Patterns from untrusted configs, matched against module paths by PEFT's rules and within a bound of time and memory.

PEFT matches with `re`, which a pattern like `(a+)+$` can hold for ever. Here `regex` matches with a time limit. Its
compiler in turn copies a repeated group once per required repeat, so fifty characters can ask for gigabytes: what a
pattern would unfold to is counted before it is compiled. Only the syntax that `re` and `regex` read alike is accepted.
"""

import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import regex

from swaplora_adapters.artifact.complaints import quoted
from swaplora_adapters.errors import InvalidAdapterError

MAX_PATTERN_CHARS = 2048
MAX_UNFOLDED_ITEMS = 4096
MAX_GROUP_DEPTH = 32
MATCH_SECONDS = 0.3
COMPARE_SECONDS = 3e-6

_PLAIN = re.compile(r"[A-Za-z0-9_.]+")
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")
_TOKEN = re.compile(
    r"""
      (?P<open>\((?!\?)|\(\?(?:[:=!]|<[=!]))
    | (?P<close>\))
    | (?P<repeat>[*+?]|\{(?P<count>\d{1,4})(?:,\d{0,4})?\}|\{,\d{1,4}\})
    | \[\^?\]?(?:[^\]\[\\]|\\[dDwWsS]|\\[^A-Za-z0-9])*\]
    | \\[dDwWsSbBAZ] | \\[^A-Za-z0-9]
    | [^\\()*+?{\[]
    """,
    re.VERBOSE | re.DOTALL,
)

Value = TypeVar("Value")


def pattern_complaint(pattern: str) -> str | None:
    """Why `pattern` cannot be used, or None; without compiling it."""
    if not pattern or len(pattern) > MAX_PATTERN_CHARS:
        return f"must have 1 to {MAX_PATTERN_CHARS} characters"
    if _PLAIN.fullmatch(pattern):
        return None
    return _syntax_complaint(pattern)


def _syntax_complaint(pattern: str) -> str | None:
    """Tile the pattern with tokens, counting per open group how many items it unfolds to once repeats are copied."""
    sizes = [0]
    last = position = 0
    while position < len(pattern):
        token = _TOKEN.match(pattern, position)
        if token is None:
            return f"uses syntax that is not supported at character {position}"
        position = token.end()
        if token["open"]:
            sizes.append(0)
            continue
        if token["repeat"]:
            copies = int(token["count"] or token["repeat"] == "+")
            sizes[-1] += last * copies
            last *= copies + 1
        elif token["close"] and len(sizes) == 1:
            return "has a ) without a ("
        else:
            last = 1 + (sizes.pop() if token["close"] else 0)
            sizes[-1] += last
        if max(last, *sizes) > MAX_UNFOLDED_ITEMS or len(sizes) > MAX_GROUP_DEPTH:
            return "repeats or nests too much"
    return "has a ( without a )" if len(sizes) > 1 else None


class Matcher:
    """Matches module paths within one budget of CPU time; make one per adapter and task.

    Every method raises InvalidAdapterError, naming the config's field, when the budget is spent or a pattern is wrong.
    """

    def __init__(self, seconds: float = MATCH_SECONDS) -> None:
        self._seconds_left = seconds
        self._compiled: dict[str, regex.Pattern[str]] = {}
        self._plain: dict[str, _PlainPatterns] = {}  # by field
        self._exact: dict[str, dict[str, Any]] = {}  # by field

    def check(self, field: str, pattern: str) -> None:
        """Raise unless `pattern` is one that the other methods accept."""
        with self._spending(field):
            complaint = pattern_complaint(pattern)
        if complaint:
            raise InvalidAdapterError([f"{field}: the pattern {quoted(pattern)} {complaint}"])
        if not _PLAIN.fullmatch(pattern):
            self._match(field, pattern, "")

    def is_fullmatch(self, field: str, pattern: str, module: str) -> bool:
        """PEFT's rule for `target_modules` and `exclude_modules` given as a string."""
        return self._match(field, f"(?:{pattern})\\Z", module) is not None

    def value_for(self, field: str, patterns: Sequence[tuple[str, Value]], module: str, default: Value) -> Value:
        """PEFT's rule for `rank_pattern` and `alpha_pattern` (`peft.utils.other.get_pattern_key`).

        The first pattern, in the file's order, that matches the whole path or what follows one of its dots. A field
        always comes with the same `patterns`.
        """
        if not patterns:
            return default
        plain = self._plain.get(field)
        if plain is None:
            plain = self._plain[field] = _PlainPatterns([pattern for pattern, _ in patterns])
        self._charge(field, plain.cost(module))
        first = plain.first_match(module)
        for position in plain.others:
            if position > first:
                break
            if self._match(field, rf"(.*\.)?({patterns[position][0]})$", module):
                return patterns[position][1]
        return patterns[first][1] if first < len(patterns) else default

    def exact_value_for(self, field: str, values: Sequence[tuple[str, Value]], module: str, default: Value) -> Value:
        """The value given for exactly this path. A field always comes with the same `values`."""
        if field not in self._exact:
            self._exact[field] = dict(values)
        value: Value = self._exact[field].get(module, default)
        return value

    def layer_index(self, field: str, patterns: Sequence[str], module: str) -> int | None:
        """PEFT's rule for the number of the layer that `module` lies in; `patterns` may name the list of layers."""
        match: re.Match[str] | regex.Match[str] | None = None
        if not patterns:
            match = _ANY_LAYER.match(module)
        for pattern in patterns:
            match = self._match(field, rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", module)
            if match is not None:
                break
        index = match.groupdict().get("idx") if match else None
        return None if index is None else int(index)

    def _match(self, field: str, source: str, module: str) -> "regex.Match[str] | None":
        with self._spending(field) as seconds:
            compiled = self._compiled.get(source)
            if compiled is None:
                compiled = self._compiled[source] = regex.compile(source, cache_pattern=False)
            return compiled.match(module, timeout=seconds)

    @contextmanager
    def _spending(self, field: str) -> Iterator[float]:
        """Yield the seconds left and take off those that the body used."""
        self._charge(field, 0.0)
        started = time.thread_time()
        try:
            yield self._seconds_left
        except TimeoutError:
            raise InvalidAdapterError([f"{field}: its patterns take too long to match"]) from None
        except regex.error as error:
            raise InvalidAdapterError([f"{field}: not a regular expression: {quoted(str(error))}"]) from None
        finally:
            self._seconds_left -= time.thread_time() - started

    def _charge(self, field: str, seconds: float) -> None:
        self._seconds_left -= seconds
        if self._seconds_left <= 0:
            raise InvalidAdapterError([f"{field}: its patterns take too long to match"])


def path_ends(module: str) -> Iterator[str]:
    """The whole path, and what follows each of its dots."""
    yield module
    for position, char in enumerate(module):
        if char == ".":
            yield module[position + 1 :]


class _PlainPatterns:
    """The patterns of letters, digits and dots alone: there may be one per module, so they are looked up, not tried.

    A dot still stands for any character. A pattern that differs from the end of a path it matches therefore has more
    dots than that, which few patterns have; only those are compared one by one.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self.others = [position for position, pattern in enumerate(patterns) if not _PLAIN.fullmatch(pattern)]
        self._num_patterns = len(patterns)
        self._positions = {pattern: position for position, pattern in enumerate(patterns)}
        self._by_length: dict[int, list[str]] = defaultdict(list)
        self._most_dots: dict[int, int] = defaultdict(int)
        for pattern in patterns:
            if "." in pattern and _PLAIN.fullmatch(pattern):
                self._by_length[len(pattern)].append(pattern)
                self._most_dots[len(pattern)] = max(self._most_dots[len(pattern)], pattern.count("."))

    def cost(self, module: str) -> float:
        """Seconds of CPU time that `first_match` may take."""
        return COMPARE_SECONDS * (1 + sum(len(self._rivals(end)) for end in path_ends(module)))

    def first_match(self, module: str) -> int:
        """The position of the first pattern that matches an end of the path, or the number of patterns if none does."""
        first = self._num_patterns
        for end in path_ends(module):
            first = min(first, self._positions.get(end, first))
            for pattern in self._rivals(end):
                if all(p in (c, ".") for p, c in zip(pattern, end, strict=True)):
                    first = min(first, self._positions[pattern])
        return first

    def _rivals(self, end: str) -> Sequence[str]:
        """The patterns that may match without being equal."""
        return self._by_length[len(end)] if self._most_dots.get(len(end), 0) > end.count(".") else ()
