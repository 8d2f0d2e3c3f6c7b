"""What servers share besides adapters: small files by digest, and who of them does what is to be done once."""

import secrets
from functools import partial
from pathlib import Path

from swaplora_adapters.store.shared.log import tried
from swaplora_adapters.store.shared.objects import Objects

CLAIM_SECONDS = 900.0  # after which whoever claimed something has perhaps gone


class Extras:
    """Any thread may call; each raises StoreUnreachableError."""

    def __init__(self, objects: Objects, store_id: str) -> None:
        self._objects = objects
        self._tasks, self._claims = f"{store_id}/tasks/", f"{store_id}/claims/"
        self._self = secrets.token_hex(16).encode()

    def put_task(self, name: str, path: Path) -> None:
        """Durable when this returns; never removed."""
        tried(lambda: self._objects.put(self._tasks + name, path))

    def fetch_task(self, name: str, path: Path) -> bool:
        """Whether it is there. Raises StorageFullError."""
        path.unlink(missing_ok=True)
        return tried(lambda: self._objects.fetch(self._tasks + name, path))

    def claim(self, name: str) -> bool:
        """Whether it is this server that is to do what is called so; what was claimed by one that is gone comes back.

        Two may do it once in a while, which must do no harm.
        """
        key = self._claims + name
        create = partial(self._objects.create, key, self._self)
        if tried(create) or tried(lambda: self._objects.get(key)) == self._self:
            return True
        if not any(each.age > CLAIM_SECONDS for each in self._objects.under(key)):
            return False
        self._objects.remove(key)
        return tried(create)
