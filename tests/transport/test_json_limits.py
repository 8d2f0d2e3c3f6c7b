"""JSON that would hold up every thread is told from its bytes, whatever its strings hold."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaplora_server.http.transport import json_limits
from swaplora_server.service.errors import RequestError

HARD = st.text(st.sampled_from('a,:[]{}"\\\u6f22'))
LIMIT = 6
values = st.recursive(
    st.none() | st.integers() | HARD,
    lambda inner: st.lists(inner, max_size=LIMIT) | st.dictionaries(HARD, inner, max_size=LIMIT),
    max_leaves=3 * LIMIT,
)


def num_commas(value: Any) -> int:
    if not isinstance(value, list | dict):
        return 0
    return max(0, len(value) - 1) + sum(map(num_commas, value.values() if isinstance(value, dict) else value))


def num_nodes(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + len(value) + sum(map(num_nodes, value.values()))
    return 1 + sum(map(num_nodes, value)) if isinstance(value, list) else 0


def is_refused(raw: bytes | bytearray) -> bool:
    try:
        json_limits.check_limits(raw)
    except RequestError as error:
        return error.code == "invalid_request"
    return False


@given(values, st.booleans())
def test_items_and_nodes_are_counted_outside_of_strings(value: Any, ascii_only: bool) -> None:
    raw = json.dumps(value, ensure_ascii=ascii_only).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_limits, "MAX_ITEMS", LIMIT)
        patch.setattr(json_limits, "MAX_NODES", LIMIT)
        assert is_refused(raw) == (num_commas(value) > LIMIT or num_nodes(value) > LIMIT)
        assert is_refused(bytearray(raw)) == is_refused(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b'["' + b"," * (json_limits.MAX_ITEMS + 1) + b'"]',
        b'["' + b"[" * (json_limits.MAX_NODES + 1) + b'"]',
        b"[" + b"1," * (json_limits.MAX_ITEMS - 1) + b"1]",
        b'["' + b"a" * 2 * json_limits.MAX_BARE_BYTES + b'"]',
        b'["' + b"\\n" * json_limits.MAX_ESCAPES + b'"]',
    ],
    ids=["text of commas", "text of brackets", "token ids", "text", "escapes"],
)
def test_what_is_large_and_light_passes(raw: bytes) -> None:
    assert not is_refused(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"[" + b"1," * (json_limits.MAX_ITEMS + 1) + b"1]",
        b"[" + b"[]," * json_limits.MAX_NODES + b"1]",
        b"[" + b"{}," * json_limits.MAX_NODES + b"1]",
        b"{" + b'"":1,' * (json_limits.MAX_NODES + 1) + b'"":1}',
        b"[" + b'"",' * (json_limits.MAX_ITEMS + json_limits.MAX_NODES + 2) + b"1]",
        b'["' + b"\\n" * (json_limits.MAX_ESCAPES + 1) + b'"]',
        b"[" + (b"1" * 4000 + b",") * (json_limits.MAX_BARE_BYTES // 4000) + b"1]",
        b"[1" + b" " * json_limits.MAX_BARE_BYTES + b"]",
    ],
    ids=["items", "lists", "objects", "names", "strings", "escapes", "digits", "space"],
)
def test_what_has_too_many_parts_is_refused(raw: bytes) -> None:
    assert is_refused(raw)
