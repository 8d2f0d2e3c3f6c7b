"""Files of examples: what is refused, with its line, and what is held out."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lessons import chat, write
from swaplora_adapters.train.data import Data, DataError, Example, read_data, split, split_by_file

PAIR = {"prompt": "a", "completion": "b"}


def of(lines: list[str]) -> Data:
    examples = [Example(number, {"prompt": line, "completion": "x"}) for number, line in enumerate(lines, start=1)]
    return Data(Path("data.jsonl"), "sha256:", examples)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a"', "line 2: it is not JSON"),
        ("[1]", "line 2: it is no object"),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', "line 2: it"),
        ('{"prompt": "\\ud800", "completion": "c"}', "line 2: it"),
        ('{"prompt": "a", "completion": ""}', "line 2: completion is empty"),
        ('{"prompt": 1, "completion": "c"}', "line 2: prompt must be text"),
        ('{"prompt": "a", "completion": "c", "weight": 2}', "line 2: it has 'completion', 'prompt', 'weight'"),
        ('{"prompt": "a"}', "line 2: it has 'prompt'"),
        (json.dumps(chat("a", "b")), "has lines of two shapes, completion with prompt (line 1) and messages (line 2)"),
        ('{"messages": "a"}', "line 2: messages must be a list of two or more"),
        ('{"messages": [{"role": "user", "content": "a"}, 1]}', "line 2: messages[1] is no object"),
        (json.dumps(chat("a", "")), "line 2: messages[1].content is empty"),
        (json.dumps(chat("a", "b", "c")), "line 2: the last message must be the assistant's"),
        (json.dumps({"messages": chat("a", "b")["messages"][1:] * 2}), "line 2: the first message cannot be the"),
        (json.dumps({"messages": [{"role": "bot", "content": "a"}] * 2}), "line 2: messages[0].role must be one of"),
        (json.dumps({"messages": [{"role": "user", "content": ["a"]}] * 2}), "messages[0].content must be text"),
        (
            json.dumps({"messages": [{"role": "user", "content": "a", "tool_calls": []}] * 2}),
            "line 2: messages[0] has 'content', 'role', 'tool_calls'",
        ),
    ],
)
def test_a_line_that_is_no_example_is_refused_by_its_number(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(PAIR)}\n{line}\n")
    with pytest.raises(DataError) as refused:
        read_data(path)
    assert words in str(refused.value)


def test_of_many_bad_lines_the_first_are_told(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("{\n" * 25)
    with pytest.raises(DataError) as refused:
        read_data(path)
    assert len(refused.value.reasons) == 11
    assert refused.value.reasons[-1] == "data.jsonl: and 15 lines more"


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe"])
def test_a_file_without_examples_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError):
        read_data(path)


def test_lines_that_say_the_same_are_found_however_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n{"completion":"b","prompt":"\\u0061"}\r\n')
    assert read_data(path).repeated == [3]


@given(st.lists(st.sampled_from("abcdefghijkl"), min_size=2), st.floats(0, 0.99), st.integers(0, 99))
def test_what_is_held_out_is_never_learnt(lines: list[str], share: float, seed: int) -> None:
    data = of(lines)
    try:
        parts = split(data, share, seed)
    except DataError:
        num = round(share * len(set(lines)))
        assert num in (0, len(set(lines)))
        return
    learnt, held_out = ({example.content for example in part} for part in (parts.learnt, parts.held_out))
    assert not learnt & held_out
    assert len(parts.learnt) + len(parts.held_out) == len(lines)
    assert len(held_out) == (round(share * len(set(lines))) if share else 0)
    assert split(data, share, seed) == parts


def test_another_seed_holds_out_others() -> None:
    data = of([str(n) for n in range(40)])
    assert split(data, 0.5, 1).held_out != split(data, 0.5, 2).held_out


def test_of_a_file_of_others_those_that_are_learnt_as_well_are_counted(tmp_path: Path) -> None:
    data = read_data(write(tmp_path / "a.jsonl", [PAIR, {**PAIR, "prompt": "c"}]))
    others = read_data(write(tmp_path / "b.jsonl", [PAIR, {**PAIR, "prompt": "d"}]))
    parts = split_by_file(data, others)
    assert (len(parts.learnt), len(parts.held_out), parts.num_shared) == (2, 2, 1)
