"""Which base the servers of one store serve: the first of them says it, and no server of another one begins.

<id>/base.json         a format, and what `Base` holds
"""

import json
from typing import NamedTuple

from swaplora_adapters.files.disk import StoreError
from swaplora_adapters.store.shared.objects import Objects
from swaplora_adapters.store.shared.trying import FORMAT, check_format, tried

_SHOWN = 12  # hexadecimal digits


class Base(NamedTuple):
    """What answers depend on besides adapters."""

    name: str  # what requests call it
    dtype: str  # that its linears and adapters are computed in
    weights: str  # a digest of all bits
    reading: str  # the same of its configuration, tokenizer and chat template, as these libraries understand them
    libraries: str

    def is_same(self, other: "Base") -> bool:
        """Other libraries may write the same configuration in another way: weights alone tell then."""
        are_alike = self[:3] == other[:3]
        return are_alike and (self.reading == other.reading or self.libraries != other.libraries)

    def __str__(self) -> str:
        return f"{self.name} in {self.dtype}, weights {self.weights[:_SHOWN]}, configuration {self.reading[:_SHOWN]}"


def agree_on_base(objects: Objects, store_id: str, base: Base) -> None:
    """Make a store that has no base one of `base`. Raises StoreError for another's, and StoreUnreachableError."""
    key, content = f"{store_id}/base.json", json.dumps({"format": FORMAT, **base._asdict()}).encode()
    found = tried(lambda: objects.get(key))
    if found is None and not tried(lambda: objects.create(key, content)):
        found = tried(lambda: objects.get(key))
    if found is None:
        return
    theirs = _read(found, key)
    if not theirs.is_same(base):
        raise StoreError(
            f"the shared store is for another base ({theirs}) than this server's ({base}): start it with that base, "
            "--dtype and --served-model-name, or choose another address for a store of its own; to "
            f"change the base of all servers, stop them, remove {key} from the store, and start them with the new one"
        )


def _read(content: bytes, key: str) -> Base:
    """StoreError for what is damaged, and for what another release has written."""
    try:
        told = json.loads(content)
        if not isinstance(told, dict):
            raise TypeError("it is no JSON object")
        found = told.get("format", FORMAT - 1)  # the earlier release says none
        if not isinstance(found, int) or not all(isinstance(told.get(field, ""), str) for field in Base._fields):
            raise TypeError("a field is of another type")
        check_format(found, key)
        return Base(**{field: told[field] for field in Base._fields})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        wrong = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise StoreError(
            f"{key} in the shared store, which says what base all serve, is damaged ({wrong}): bring it back from a "
            "backup, or stop all servers, remove it, and start first one with the base that they had"
        ) from None
