"""Stop strings are found where a look at the whole text finds them, however it is cut, in time that is linear."""

from collections.abc import Sequence
from typing import SupportsIndex, overload

from hypothesis import example, given
from hypothesis import strategies as st

from swaplora_server.service.stop_strings import StopFinder, StopStrings, Unit, _Pattern

HIDDEN = {7: "<p>", 8: "<q>"}
UNITS = st.lists(st.sampled_from([*"aaaabbbb", 7, 8]), max_size=24)
STRINGS = st.lists(
    st.lists(st.sampled_from([*"aaaabbbb", "<p>", "<q>"]), min_size=1, max_size=5).map("".join), min_size=1, max_size=3
)


def spelled(string: str) -> list[Unit]:
    return [{"p": 7, "q": 8}.get(char, char) for char in string.replace("<", "").replace(">", "")]


def seen_by(string: str, units: Sequence[Unit]) -> list[Unit]:
    """The text for one who looks for `string`: hidden tokens are there only if it names them."""
    return [unit for unit in units if isinstance(unit, str) or HIDDEN[unit] in string]


def expected(strings: list[str], units: list[Unit], may_stop_from: int) -> tuple[int, int] | None:
    """The end of the first stop string that is complete, in units, and its characters."""
    for end in range(may_stop_from + 1, len(units) + 1):
        ends = []
        for string in strings:
            seen, sought = seen_by(string, units[:end]), spelled(string)
            is_new = isinstance(units[end - 1], str) or HIDDEN[units[end - 1]] in string  # type: ignore[index]
            if is_new and seen[-len(sought) :] == sought:
                ends.append(sum(isinstance(unit, str) for unit in sought))
        if ends:
            return end, max(ends)
    return None


@example([*"aaab"], ["aab"], 0, [1] * 24)
@example([*"ababa"], ["aba"], 3, [1] * 24)
@example([*"abababc"], ["ababc"], 0, [3] * 24)
@example([*"aa", 7, *"ab", 7, "b"], ["a<p>b"], 3, [1] * 24)
@given(UNITS, STRINGS, st.integers(0, 24), st.lists(st.integers(1, 5), min_size=24, max_size=24))
def test_the_first_stop_string_to_be_complete_is_found_however_the_text_is_cut(
    units: list[Unit], strings: list[str], may_stop_from: int, steps: list[int]
) -> None:
    finder = StopFinder(StopStrings(strings, HIDDEN))
    wanted = expected(strings, units, may_stop_from)
    read = 0
    for step in steps:
        # a step lies on one side of where it may stop
        length = min(step, may_stop_from - read) if read < may_stop_from else step
        part = units[read : read + length]
        match = finder.read(
            "".join(map(str, part)) if all(isinstance(unit, str) for unit in part) else part,
            may_stop=read >= may_stop_from,
        )
        if match is not None:
            assert (read + match.end, match.length) == wanted
            return
        read += len(part)
        if wanted is not None and read < wanted[0]:
            rest = wanted[0] - wanted[1]
            shown = [unit for unit in units[:read] if isinstance(unit, str)]
            before_match = [unit for unit in units[: wanted[0]] if isinstance(unit, str)]
            assert len(shown) - finder.num_held <= len(before_match) - wanted[1], rest
    assert wanted is None


class Counted(Sequence[str]):
    """A text that counts how often it is looked at."""

    def __init__(self, text: str) -> None:
        self.text, self.looks = text, 0

    def __len__(self) -> int:
        return len(self.text)

    @overload
    def __getitem__(self, place: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[str]: ...
    def __getitem__(self, place: SupportsIndex | slice) -> str | Sequence[str]:
        self.looks += 1
        return self.text[place]


def test_the_work_is_linear_where_every_end_may_be_a_beginning() -> None:
    length = 4000
    own = Counted("a" * length + "b")
    pattern, matched = _Pattern("", own), 0
    own.looks = 0
    for _ in range(3 * length):
        matched, end = pattern.read(matched, ["a"])
        assert end is None
    assert own.looks < 8 * 3 * length
    assert pattern.read(matched, ["b"]) == (length + 1, 1)


def test_a_long_stop_string_costs_nothing_before_it_begins() -> None:
    own = Counted("a" * 100_000)
    pattern = _Pattern("", own)
    own.looks = 0
    assert pattern.read(0, "b" * 100) == (0, None)
    assert own.looks < 10
