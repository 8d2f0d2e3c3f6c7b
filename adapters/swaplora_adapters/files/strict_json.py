"""JSON from strangers: what the standard parser lets pass in silence is refused here."""

import json
import math
import re
from collections import Counter
from typing import Any, NoReturn

from swaplora_adapters.errors import InvalidAdapterError
from swaplora_adapters.files.complaints import quoted

MAX_INTEGER_DIGITS = 20
BYTES_PER_VALUE = 8
_MARKS = b",[]{}"
_NO_MARK_BYTES = bytes(byte for byte in range(256) if byte not in _MARKS)
_NO_MARKS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[^",\[\]{}]+', re.DOTALL)


def loads(raw: bytes, *, what: str, max_bytes: int, max_depth: int) -> Any:
    """Parse UTF-8 JSON; `what` names the document in complaints.

    Raises InvalidAdapterError for more than `max_bytes` bytes, a value for every 8 of those, or `max_depth` levels;
    for text that is not UTF-8 or not JSON, a key twice in one object (however it is escaped), NaN, infinity, numbers
    out of range, and lone surrogates.
    """
    if len(raw) > max_bytes:
        raise InvalidAdapterError([f"{what} is larger than {max_bytes} bytes"])
    text = _decode(raw, what)
    _check_extent(_marks(text), max_bytes // BYTES_PER_VALUE, max_depth, what)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_refuse_constant,
        )
    except json.JSONDecodeError as error:
        raise InvalidAdapterError([f"{what} is not JSON: {error.msg} (character {error.pos})"]) from None
    except _RefusedError as error:
        raise InvalidAdapterError([f"{what}: {error}"]) from None
    if "\\u" in text:
        _refuse_lone_surrogates(value, what)
    return value


class _RefusedError(Exception):
    """Carries a complaint out of the parser's hooks."""


def _decode(raw: bytes, what: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidAdapterError([f"{what} is not UTF-8 (byte {error.start})"]) from None


def _marks(text: str) -> str:
    """The brackets and commas that are in no string."""
    if "\\" in text:
        return _NO_MARKS.sub("", text)
    outside = "".join(text.split('"')[::2])
    return outside.encode().translate(None, _NO_MARK_BYTES).decode()


def _check_extent(marks: str, max_values: int, max_depth: int, what: str) -> None:
    """Raise for too many levels or values by their brackets and commas: asked before any object is made of them."""
    if _is_deeper(marks.replace(",", ""), max_depth):
        raise InvalidAdapterError([f"{what} is nested deeper than {max_depth} levels"])
    if sum(marks.count(mark) for mark in "[{,") > max_values:
        raise InvalidAdapterError([f"{what} holds more than {max_values} values"])


def _is_deeper(brackets: str, max_depth: int) -> bool:
    """Whether brackets nest deeper than `max_depth`."""
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in "[{" else -1
        if depth > max_depth:
            return True
    return False


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise _RefusedError(f"the key {quoted(twice)} appears twice")
    return fields


def _integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise _RefusedError(f"an integer has more than {MAX_INTEGER_DIGITS} digits")
    return int(digits)


def _number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _RefusedError(f"the number {quoted(digits)} is out of range")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise _RefusedError(f"{name} is not a JSON number")


def _refuse_lone_surrogates(value: object, what: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidAdapterError([f"{what} holds a lone surrogate, which is not text"]) from None
