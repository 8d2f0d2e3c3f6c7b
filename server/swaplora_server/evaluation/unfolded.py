"""How large a JSON schema is once each reference in it is replaced by what it refers to, as a validator walks it."""

from collections.abc import Mapping
from typing import Any

MAX_PARTS = 4096
MAX_DEPTH = 256
_REFUSED = ("unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef")
_DEFINITIONS = ("$defs", "definitions")
_OF_NAMES = frozenset({*_DEFINITIONS, "properties", "patternProperties", "dependentSchemas", "dependencies"})


def check_unfolded(schema: Mapping[str, Any]) -> None:
    """Raise ValueError for a schema whose compilation or validation may take far longer than its length says.

    Whatever it holds is taken for a schema, wherever it stands, so that no way to apply one is missed; where a schema
    has an object of names, such as `properties`, its keys are no keywords. What has MAX_PARTS objects at most, with no
    reference to what it is within, looks so many times at each part of a text.
    """
    _Unfolding(schema).size(schema, 0)


class _Unfolding:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._ids = ("$id", "id") if "draft-04" in str(root.get("$schema")) else ("$id",)
        # by identity, and whether its keys are names: objects and depth; None while within
        self._found: dict[tuple[int, bool], tuple[int, int] | None] = {}

    def size(self, part: Any, depth: int, *, has_names: bool = False) -> tuple[int, int]:
        """Of what `part` unfolds to: how many objects, and how deep they and lists are in each other.

        `has_names`: it is no schema, its keys are names of such.
        """
        if not isinstance(part, dict | list):
            return 0, 0
        key = id(part), has_names
        if key not in self._found:
            if depth >= MAX_DEPTH:
                raise ValueError(f"with its references followed it is nested deeper than {MAX_DEPTH}")
            self._found[key] = None
            inner = [
                self.size(each, depth + 1, has_names=names) for each, names in self._inner(part, has_names=has_names)
            ]
            num_objects = isinstance(part, dict) + sum(num for num, _ in inner)
            self._found[key] = num_objects, 1 + max((height for _, height in inner), default=0)
        found = self._found[key]
        if found is None:
            raise ValueError("$ref: it refers to what it is within, and a schema here may not contain itself")
        if found[0] > MAX_PARTS:
            raise ValueError(f"with its references followed it has more than {MAX_PARTS} objects")
        if depth + found[1] > MAX_DEPTH:
            raise ValueError(f"with its references followed it is nested deeper than {MAX_DEPTH}")
        return found

    def _inner(self, part: dict[str, Any] | list[Any], *, has_names: bool) -> list[tuple[Any, bool]]:
        """What is in it, and of each whether its keys are names."""
        if isinstance(part, list):
            return [(each, False) for each in part]
        is_root = part is self._root
        if not is_root and (nested := next((key for key in self._ids if isinstance(part.get(key), str)), None)):
            raise ValueError(f"{nested} is for the whole schema, not for a part of it")
        if not has_names and (refused := next((key for key in _REFUSED if key in part), None)):
            raise ValueError(f"{refused} is not looked at: its cost has no bound")
        own = [
            (value, not has_names and key in _OF_NAMES)
            for key, value in part.items()
            if not (is_root and key in _DEFINITIONS)  # applied where they are named
        ]
        reference = part.get("$ref")
        return [*own, (self._target(reference), False)] if isinstance(reference, str) else own

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
