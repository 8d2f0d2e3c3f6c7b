"""What servers share besides adapters: small files by digest, and who of them does what is to be done once."""

from pathlib import Path

from swaplora_adapters.store.shared.objects import Objects
from swaplora_adapters.store.shared.trying import tried

CLAIM_SECONDS = 300.0  # after which who has claimed something claims it anew, and after twice that has perhaps gone


class Extras:
    """Any thread may call; each raises StoreUnreachableError."""

    def __init__(self, objects: Objects, store_id: str, server_id: str) -> None:
        """`server_id` is that of this server, also after a restart."""
        self._objects = objects
        self._tasks, self._claims = f"{store_id}/tasks/", f"{store_id}/claims/"
        self._self = server_id.encode()

    def put_task(self, name: str, path: Path) -> None:
        """Durable when this returns; never removed."""
        tried(lambda: self._objects.put(self._tasks + name, path))

    def fetch_task(self, name: str, path: Path) -> bool:
        """Whether it is there. Raises StorageFullError."""
        path.unlink(missing_ok=True)
        return tried(lambda: self._objects.fetch(self._tasks + name, path))

    def claim(self, name: str) -> bool:
        """Whether it is this server that is to do what is called so, for `CLAIM_SECONDS` from now at least.

        Whoever has it asks again in time, or it is another's. Two may do it once in a while, which must do no harm.
        """
        prefix = f"{self._claims}{name}/"
        taken = tried(lambda: self._objects.under(prefix))
        number = 0
        if taken:
            last = taken[-1]
            is_ours = tried(lambda: self._objects.get(last.key)) == self._self
            if not is_ours and last.age < 2 * CLAIM_SECONDS:
                return False
            number = int(last.key.removeprefix(prefix)) + 1
        key = f"{prefix}{number:08d}"
        # who makes the next object has it: the one before it is taken from under nobody
        if not tried(lambda: self._objects.create(key, self._self) or self._objects.get(key) == self._self):
            return False
        for each in taken:
            self._objects.remove(each.key)
        return True

    def let_go(self, name: str) -> None:
        """What this server has claimed is done."""
        for each in self._objects.under(f"{self._claims}{name}/"):
            self._objects.remove(each.key)
