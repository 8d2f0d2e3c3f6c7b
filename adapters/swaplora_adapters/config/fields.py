"""The fields of an adapter_config.json read one by one: each by its type and bounds, with every complaint kept."""

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from swaplora_adapters.config.matching import check_pattern
from swaplora_adapters.errors import InvalidAdapterError, UnsupportedAdapterError
from swaplora_adapters.files.complaints import capped, quoted

MAX_NAME_CHARS = 512
MAX_LABELS = 4096
MAX_LAYER_INDEX = 1_000_000
MAX_TOKEN_ID = 2**31 - 1
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.]+")

Default = TypeVar("Default")


class ConfigFields:
    """Typed access to raw fields. A method that finds a field wrong notes it and returns the default."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw
        self._read: set[str] = set()
        self.malformed: list[str] = []
        self.unsupported: list[str] = []

    def get(self, field: str, default: Any = None) -> Any:
        """The raw value of a field, which counts as read from now on."""
        self._read.add(field)
        return self._raw.get(field, default)

    def boolean(self, field: str) -> bool:
        """A switch that is off when absent or null."""
        value = self.get(field)
        is_switch = value is None or isinstance(value, bool)
        return bool(value) if is_switch else self._wrong(field, "must be true or false", False)

    def integer(self, field: str, default: int, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        return self._checked_integer(field, self.get(field, default), default, low, high)

    def number(self, field: str, default: float, limit: float) -> float:
        """A number other than zero from -`limit` to `limit`."""
        return self._checked_number(field, self.get(field, default), default, limit)

    def choice(self, field: str, choices: tuple[str, ...]) -> str:
        """One of a few words, the first when absent."""
        value = self.get(field, choices[0])
        if isinstance(value, str) and value in choices:
            return value
        return self._wrong(field, f"must be one of {', '.join(choices)}", choices[0])

    def text(self, field: str, max_chars: int) -> str | None:
        """Printable text, or None."""
        value = self.get(field)
        if value is None or (isinstance(value, str) and len(value) <= max_chars and value.isprintable()):
            return value
        return self._wrong(field, f"must be null or at most {max_chars} printable characters", None)

    def names(self, field: str) -> frozenset[str] | str:
        """A list of names, or one regular expression; nothing given is the empty set."""
        value = self.get(field)
        if isinstance(value, str) and value:
            return self._pattern(field, value)
        return frozenset(self._strings(field, value))

    def patterns(self, field: str) -> tuple[str, ...]:
        """A list of regular expressions, or one alone, each of which stands in front of others as it is."""
        value = self.get(field)
        strings = self._strings(field, [value] if isinstance(value, str) and value else value)
        return tuple(self._pattern(field, pattern, is_part=True) for pattern in strings)

    def labels(self, field: str) -> tuple[str, ...]:
        """Names by number, `{"0": "no", "1": "yes"}`, as transformers writes them; nothing given is none."""
        value = self.get(field) or {}
        names = list(value.values()) if isinstance(value, dict) else [None]
        is_named = all(isinstance(name, str) and name.isprintable() and len(name) <= MAX_NAME_CHARS for name in names)
        if is_named and len(names) <= MAX_LABELS and {str(number) for number in range(len(names))} == value.keys():
            return tuple(value[str(number)] for number in range(len(names)))
        return self._wrong(field, f"must name at most {MAX_LABELS} labels by number, from 0 on", ())

    def layers(self, field: str) -> frozenset[int]:
        """A list of layer numbers, or one alone; nothing given is the empty set."""
        value = self.get(field)
        items = [value] if type(value) is int else value or []
        if isinstance(items, list) and all(type(item) is int and 0 <= item <= MAX_LAYER_INDEX for item in items):
            return frozenset(items)
        return self._wrong(field, f"must be layer numbers from 0 to {MAX_LAYER_INDEX}", frozenset())

    def plain_names(self, field: str) -> tuple[str, ...]:
        """A list of module names without any pattern, sorted."""
        value = self.get(field)
        names = self._strings(field, value)
        if strange := [name for name in names if not _PLAIN_NAME.fullmatch(name)]:
            return self._wrong(field, f"must be names of modules, not {quoted(strange[0])}", ())
        return tuple(sorted(set(names)))

    def token_ids(self, field: str) -> tuple[int, ...]:
        """A list of token ids, in its order; nothing given is the empty one."""
        return self._checked_token_ids(field, self.get(field))

    def token_ids_by_module(self, field: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Distinct token ids by module name; a list alone is given for the name ""."""
        value = self.get(field)
        given = value.items() if isinstance(value, dict) else [("", value)] if value else []
        if strange := [name for name, _ in given if name and not _PLAIN_NAME.fullmatch(name)]:
            return self._wrong(field, f"must be names of modules, not {quoted(strange[0])}", ())
        found = tuple((name, self._checked_token_ids(field, ids)) for name, ids in given)
        if any(len(set(ids)) < len(ids) for _, ids in found):
            return self._wrong(field, "lists a token twice", ())
        return found

    def masks(self, field: str) -> tuple[tuple[str, tuple[bool, ...]], ...]:
        """A list of true and false by name, as AdaLoRA's `rank_pattern` has them; null is the empty one."""
        value = self.get(field)
        masks = {} if value is None else value
        if isinstance(masks, dict) and all(_is_mask(mask) for mask in masks.values()):
            return tuple((name, tuple(mask)) for name, mask in masks.items())
        return self._wrong(field, "must map names to lists of true and false", ())

    def ranks_by_pattern(self, field: str, low: int, high: int) -> tuple[tuple[str, int], ...]:
        """A rank per pattern, in the file's order."""
        pairs = self._pattern_pairs(field)
        return tuple((key, self._checked_integer(f"{field}[{quoted(key)}]", v, low, low, high)) for key, v in pairs)

    def numbers_by_pattern(self, field: str, limit: float) -> tuple[tuple[str, float], ...]:
        """A number per pattern, in the file's order."""
        pairs = self._pattern_pairs(field)
        return tuple((key, self._checked_number(f"{field}[{quoted(key)}]", v, 1.0, limit)) for key, v in pairs)

    def given(self, names: frozenset[str]) -> tuple[str, ...]:
        """Those of `names` that are there and neither null, false nor empty, sorted; all of them count as read."""
        self._read |= names
        return tuple(sorted(name for name in names & self._raw.keys() if says_something(self._raw[name])))

    def refuse_the_rest(self, ignored: frozenset[str]) -> None:
        """Note as unsupported, by name, every field neither read nor ignored that is not null, false or empty."""
        for field in self._raw.keys() - self._read - ignored:
            value = self._raw[field]
            if says_something(value):
                shown = quoted(json.dumps(value)[:200])
                self.unsupported.append(
                    f"{quoted(field)} is not supported, it must be null, false or empty, not {shown}"
                )

    def finish(self) -> None:
        """Raise what was found: UnsupportedAdapterError if nothing is malformed, else InvalidAdapterError with all."""
        if self.malformed:
            raise InvalidAdapterError(capped([*self.malformed, *sorted(self.unsupported)]))
        if self.unsupported:
            raise UnsupportedAdapterError(capped(sorted(self.unsupported)))

    def _strings(self, field: str, value: object) -> list[str]:
        items = [] if value is None or value == "" else value
        if isinstance(items, list) and all(isinstance(item, str) and 0 < len(item) <= MAX_NAME_CHARS for item in items):
            return items
        return self._wrong(field, f"must be a list of strings of 1 to {MAX_NAME_CHARS} characters", [])

    def _checked_token_ids(self, field: str, value: object) -> tuple[int, ...]:
        items = [] if value is None else value
        if isinstance(items, list) and all(type(item) is int and 0 <= item <= MAX_TOKEN_ID for item in items):
            return tuple(items)
        return self._wrong(field, f"must be token ids from 0 to {MAX_TOKEN_ID}", ())

    def _pattern_pairs(self, field: str) -> list[tuple[str, Any]]:
        value = self.get(field)
        if value is None or isinstance(value, dict):
            return [(self._pattern(field, key), item) for key, item in (value or {}).items()]
        return self._wrong(field, "must map patterns to numbers", [])

    def _pattern(self, field: str, pattern: str, is_part: bool = False) -> str:
        try:
            check_pattern(field, pattern, is_part)
        except InvalidAdapterError as error:
            self.malformed += error.reasons
        return pattern

    def _checked_integer(self, label: str, value: object, default: int, low: int, high: int) -> int:
        if type(value) is int and low <= value <= high:
            return value
        return self._wrong(label, f"must be an integer from {low} to {high}", default)

    def _checked_number(self, label: str, value: object, default: float, limit: float) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < abs(value) <= limit:
            return float(value)
        return self._wrong(label, f"must be a number other than 0 from -{limit:g} to {limit:g}", default)

    def _wrong(self, label: str, complaint: str, default: Default) -> Default:
        self.malformed.append(f"{label} {complaint}")
        return default


def says_something(value: object) -> bool:
    """Whether it is more than a field that is left empty."""
    return value is not None and value is not False and value not in ("", [], {})


def _is_mask(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(bit, bool) for bit in value)
