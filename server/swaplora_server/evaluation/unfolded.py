"""How large a JSON schema is once each reference in it is replaced by what it refers to, as a validator walks it."""

from collections.abc import Mapping
from typing import Any

MAX_PARTS = 4096
MAX_DEPTH = 256
_REFUSED = ("unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef")
_DEFINITIONS = ("$defs", "definitions")


def check_unfolded(schema: Mapping[str, Any]) -> None:
    """Raise ValueError for a schema whose compilation or validation may take far longer than its length says.

    Whatever it holds is taken for a schema, wherever it stands, so that no way to apply one is missed. What has
    MAX_PARTS objects at most, with no reference to what it is within, looks so many times at each part of a text.
    """
    _Unfolding(schema).size(schema, 0)


class _Unfolding:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._ids = ("$id", "id") if "draft-04" in str(root.get("$schema")) else ("$id",)
        self._found: dict[int, tuple[int, int] | None] = {}  # by identity: objects and depth; None while within

    def size(self, part: Any, depth: int) -> tuple[int, int]:
        """Of what `part` unfolds to: how many objects, and how deep they and lists are in each other."""
        if not isinstance(part, dict | list):
            return 0, 0
        if id(part) not in self._found:
            if depth >= MAX_DEPTH:
                raise ValueError(f"with its references followed it is nested deeper than {MAX_DEPTH}")
            self._found[id(part)] = None
            inner = [self.size(each, depth + 1) for each in self._inner(part)]
            num_objects = isinstance(part, dict) + sum(num for num, _ in inner)
            self._found[id(part)] = num_objects, 1 + max((height for _, height in inner), default=0)
        found = self._found[id(part)]
        if found is None:
            raise ValueError("$ref: it refers to what it is within, and a schema here may not contain itself")
        if found[0] > MAX_PARTS:
            raise ValueError(f"with its references followed it has more than {MAX_PARTS} objects")
        if depth + found[1] > MAX_DEPTH:
            raise ValueError(f"with its references followed it is nested deeper than {MAX_DEPTH}")
        return found

    def _inner(self, part: dict[str, Any] | list[Any]) -> list[Any]:
        if isinstance(part, list):
            return part
        if part is self._root:
            own = [value for key, value in part.items() if key not in _DEFINITIONS]  # applied where they are named
        else:
            own = list(part.values())
            if nested := next((key for key in self._ids if isinstance(part.get(key), str)), None):
                raise ValueError(f"{nested} is for the whole schema, not for a part of it")
        if refused := next((key for key in _REFUSED if key in part), None):
            raise ValueError(f"{refused} is not looked at: its cost has no bound")
        reference = part.get("$ref")
        return [*own, self._target(reference)] if isinstance(reference, str) else own

    def _target(self, reference: str) -> Any:
        """What a reference is to: `#`, or `#/` and the keys on the way."""
        if reference == "#":
            return self._root
        found: Any = self._root
        start, *keys = reference.split("/")
        if start != "#" or "%" in reference:
            raise ValueError(f"$ref: {reference[:64]!r} is not in the schema as '#/' and keys, and nothing is fetched")
        for key in keys:
            name = key.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and name in found:
                found = found[name]
            elif isinstance(found, list) and name in map(str, range(len(found))):
                found = found[int(name)]
            else:
                raise ValueError(f"$ref: there is no {reference[:64]!r} in the schema")
        return found
