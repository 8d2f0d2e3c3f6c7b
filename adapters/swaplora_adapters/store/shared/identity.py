"""Which shared store a data directory is a copy of: no copy of one is ever taken for a copy of another.

<data dir>/shared      {"id": …, "server": …, "is_founding": …}; with the last the store was perhaps not made yet
"""

import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from swaplora_adapters.files.disk import StoreError, raising_storage_errors, sync_folder
from swaplora_adapters.store.shared.base import Base, agree_on_base
from swaplora_adapters.store.shared.objects import Objects
from swaplora_adapters.store.shared.trying import FORMAT, check_format, tried
from swaplora_adapters.store.staging import Writer

_KEY = "store.json"


class Mark(NamedTuple):
    """What a data directory says of itself."""

    store_id: str
    server_id: str
    is_founding: bool = False

    @classmethod
    def read(cls, path: Path) -> "Mark | None":
        """None where it is the copy of no shared store; StoreError."""
        try:
            told = json.loads(path.read_bytes())
            return cls(told["id"], told["server"], told["is_founding"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError) as error:
            raise StoreError(f"{path.name} in the data directory is damaged: choose another --data-dir") from error

    def write(self, path: Path) -> None:
        """Durable when this returns."""
        told = {"id": self.store_id, "server": self.server_id, "is_founding": self.is_founding}
        content = json.dumps(told).encode()
        staged = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        with raising_storage_errors():
            with Writer(staged, len(content)) as writer:
                writer.write(content)
            staged.replace(path)
            sync_folder(path.parent)


def found_or_join(objects: Objects, path: Path, base: Base, known: int, publish: Callable[[str], None]) -> Mark:
    """The mark at `path`: of which store the data directory then is a copy.

    An empty store becomes one of what the directory holds, if it has a last change that is `known`: `publish` puts that
    below the id. Raises StoreError for a directory with what is not this store's and for another base, and
    StoreUnreachableError.
    """
    mark = Mark.read(path)
    store_id = _found(objects)
    if store_id is None:
        if mark is not None and not mark.is_founding:
            raise StoreError(
                "there is no shared store at that address, and the data directory is a copy of one: is it right?"
            )
        mark = mark or Mark(secrets.token_hex(8), secrets.token_hex(8), is_founding=True)
        mark.write(path)
        if known:
            publish(mark.store_id)
        agree_on_base(objects, mark.store_id, base)
        content = json.dumps({"format": FORMAT, "id": mark.store_id, "founded_at": known}).encode()
        tried(lambda: objects.create(_KEY, content))
        store_id = _found(objects)
        assert store_id is not None
    agree_on_base(objects, store_id, base)
    if mark is not None and mark.is_founding and mark.store_id != store_id:
        mark = None  # another server was faster
        path.unlink()
    if mark is None and known:
        raise StoreError(
            "the data directory holds adapters that the shared store does not know of: choose an empty --data-dir, and "
            "upload them"
        )
    if mark is not None and mark.store_id != store_id:
        raise StoreError("the data directory is a copy of another shared store: choose another --data-dir")
    if mark is None or mark.is_founding:
        mark = Mark(store_id, secrets.token_hex(8))
        mark.write(path)
    _raise_format(objects, path.parent)
    return mark


def is_copy_of_one(path: Path) -> bool:
    """Whether a directory with the mark at `path` is the copy of a store, not what one is to be made of; StoreError."""
    mark = Mark.read(path)
    return mark is not None and not mark.is_founding


def share_no_more(path: Path) -> bool:
    """Take away the mark of a store that was perhaps not made; whether there was one. StoreError for a copy's.

    Should the store be there all the same, it will not have what the directory holds.
    """
    mark = Mark.read(path)
    if mark is None:
        return False
    if not mark.is_founding:
        raise StoreError(
            "the data directory is one server's part of a shared store: name that with --shared-store, or choose "
            "another --data-dir"
        )
    path.unlink()
    sync_folder(path.parent)
    return True


def is_founded(objects: Objects, store_id: str) -> bool:
    """Whether the store there is the one with this id. Raises StoreUnreachableError."""
    told = _told(tried(lambda: objects.get(_KEY)))
    return told is not None and told["id"] == store_id


def founded_at(objects: Objects) -> int:
    """The last change before the first one of the log. Raises StoreUnreachableError."""
    told = _told(tried(lambda: objects.get(_KEY)))
    return 0 if told is None else int(told["founded_at"])


def _found(objects: Objects) -> str | None:
    content = tried(lambda: objects.get(_KEY))
    told = _told(content)
    if content is None or told is None:
        return None
    check_format(told["format"], _KEY)
    if tried(lambda: objects.create(_KEY, content)):
        raise StoreError(
            "the shared store has let an object be made over the one that was there: it does not know conditional "
            "writes (If-None-Match: *), without which changes would be lost"
        )
    return str(told["id"])


def _raise_format(objects: Objects, folder: Path) -> None:
    """Have a store that an earlier release made say that servers of this one write there: no earlier one starts."""
    told = _told(tried(lambda: objects.get(_KEY)))
    if told is not None and told["format"] < FORMAT:
        staged = folder / f"shared.{secrets.token_hex(4)}"
        with raising_storage_errors():
            try:
                staged.write_text(json.dumps(told | {"format": FORMAT}))
                tried(lambda: objects.put(_KEY, staged))
            finally:
                staged.unlink(missing_ok=True)


def _told(content: bytes | None) -> dict[str, Any] | None:
    """StoreError for what is damaged."""
    if content is None:
        return None
    try:
        told = json.loads(content)
        return {"founded_at": 0, **told, "id": str(told["id"]), "format": int(told["format"])}
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{_KEY} in the shared store is damaged: bring it back from a backup") from error
