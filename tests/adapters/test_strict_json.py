"""JSON from strangers: everything ambiguous is refused with a complaint, and nothing hangs or recurses."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaplora_adapters.errors import InvalidAdapterError
from swaplora_adapters.files.strict_json import loads

REFUSED = {
    "empty": (b"", "not JSON"),
    "text": (b"hello", "not JSON"),
    "trailing": (b"{} {}", "not JSON"),
    "not utf-8": (b'{"a": "\xff"}', "not UTF-8 (byte 7)"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "byte order mark": (b"\xef\xbb\xbf{}", "not JSON"),
    "twice": (b'{"a": 1, "a": 1}', "'a' appears twice"),
    "twice, escaped": (b'{"a": 1, "\\u0061": 2}', "'a' appears twice"),
    "twice, deep": (b'[{"x": {"a": 1, "b": 2, "a": 3}}]', "'a' appears twice"),
    "NaN": (b"[NaN]", "NaN is not a JSON number"),
    "infinity": (b"[-Infinity]", "-Infinity is not a JSON number"),
    "1e400": (b"[1e400]", "out of range"),
    "a long integer": (b"[" + b"9" * 5000 + b"]", "more than 20 digits"),
    "deep": (b"[" * 100_000, "nested deeper than 16"),
    "deep objects": (b'{"a":' * 17 + b"1" + b"}" * 17, "nested deeper than 16"),
    "large": (b'"' + b"a" * 70_000 + b'"', "larger than 65536 bytes"),
    "lone surrogate": (b'["\\ud800"]', "lone surrogate"),
    "lone surrogate in a key": (b'{"\\udfff": 1}', "lone surrogate"),
    "raw surrogate": (b'["\xed\xa0\x80"]', "not UTF-8"),
    "control character": (b'["a\nb"]', "not JSON"),
}

SCALARS = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    SCALARS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def parse(raw: bytes) -> Any:
    return loads(raw, what="the file", max_bytes=1 << 16, max_depth=16)


@pytest.mark.parametrize(("raw", "complaint"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(raw: bytes, complaint: str) -> None:
    limit = max(len(raw), 1 << 16) if complaint.startswith("nested") else 1 << 16
    with pytest.raises(InvalidAdapterError) as caught:
        loads(raw, what="the file", max_bytes=limit, max_depth=16)
    [reason] = caught.value.reasons
    assert reason.startswith("the file")
    assert complaint in reason


@pytest.mark.parametrize(
    "text",
    [
        '{"a": {"a": 1}}',
        '["[[[[[[[[[[[[[[[[[[[["]',
        '["\\"[[[[[[[[[[[[[[[[[[[["]',
        '["\\ud83d\\ude00"]',
        "-1.5e3",
        "null",
    ],
)
def test_reads_what_is_sound(text: str) -> None:
    assert parse(text.encode()) == json.loads(text)


def test_depth_at_the_limit_is_read() -> None:
    assert parse(b"[" * 16 + b"]" * 16) is not None


def test_a_megabyte_of_brackets_is_refused_quickly() -> None:
    started = time.thread_time()
    with pytest.raises(InvalidAdapterError):
        loads(b'["' + b"[" * 500_000 + b'",' + b"[" * 500_000, what="it", max_bytes=1 << 20, max_depth=16)
    assert time.thread_time() - started < 1


def depth_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


MARKED = st.recursive(
    st.text(alphabet='{}[],:"\\a', max_size=6) | st.just(1),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='[]{},"a', max_size=4), inner, max_size=3)
    ),
)


@given(MARKED)
def test_brackets_in_strings_are_no_levels(value: Any) -> None:
    raw, depth = json.dumps(value).encode(), depth_of(value)
    assert loads(raw, what="it", max_bytes=1 << 20, max_depth=depth) == value
    if depth:
        with pytest.raises(InvalidAdapterError, match=f"deeper than {depth - 1} levels"):
            loads(raw, what="it", max_bytes=1 << 20, max_depth=depth - 1)


@given(st.binary(max_size=200) | st.text(alphabet='{}[]",:\\u0d8acf19eE-+. ', max_size=60).map(str.encode))
def test_any_bytes_parse_or_are_refused(raw: bytes) -> None:
    try:
        value = parse(raw)
    except InvalidAdapterError:
        return
    assert value == json.loads(raw)


@given(VALUES)
def test_what_json_writes_is_read_back(value: Any) -> None:
    assert parse(json.dumps(value).encode()) == value
