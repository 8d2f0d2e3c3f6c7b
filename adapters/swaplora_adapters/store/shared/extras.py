"""What servers share besides adapters: small files by digest, and who of them does what is to be done once.

    <id>/tasks/<digest>/<revision>     a task, put for that change, by which a gate names it

Earlier releases put them at <id>/tasks/<digest>.jsonl.
"""

from collections.abc import Collection
from functools import partial
from pathlib import Path

from swaplora_adapters.store.shared.objects import Listed, Objects
from swaplora_adapters.store.shared.trying import tried

_EARLIER = ".jsonl"
_EARLIER_SECONDS = 24 * 3600.0  # that one of an earlier release may be on its way in
CLAIM_SECONDS = 300.0  # after which who has claimed something claims it anew, and after twice that has perhaps gone


class Extras:
    """Any thread may call; each raises StoreUnreachableError."""

    def __init__(self, objects: Objects, store_id: str, server_id: str) -> None:
        """`server_id` is that of this server, also after a restart."""
        self._objects = objects
        self._tasks, self._claims = f"{store_id}/tasks/", f"{store_id}/claims/"
        self._self = server_id.encode()

    def put_task(self, digest: str, content: bytes, revision: int) -> None:
        """For the change with this revision, which is yet to be made; durable when this returns. `digest` is in hex."""
        tried(lambda: self._objects.create(f"{self._tasks}{digest}/{revision:020d}", content))

    def fetch_task(self, digest: str, path: Path) -> bool:
        """Whether it is there. Raises StorageFullError."""

        def fetch(key: str) -> bool:
            path.unlink(missing_ok=True)
            return self._objects.fetch(key, path)

        return any(tried(partial(fetch, each.key)) for each in self._of_task(digest))

    def has_task(self, digest: str) -> bool:
        return bool(self._of_task(digest))

    def sweep_tasks(self, named: Collection[str], revision: int) -> None:
        """Remove those that no gate names after the change `revision`, or a later one: `named` are digests in hex.

        What was put for a change up to that one was put in vain, or is named no more: whoever names it again, with a
        change after it, puts it anew for that one. So nothing is removed that a change yet to be made relies on.
        """
        for each in tried(lambda: self._objects.under(self._tasks)):
            digest, _, put_for = each.key.removeprefix(self._tasks).partition("/")
            is_over = int(put_for) <= revision if put_for else each.age > _EARLIER_SECONDS
            if is_over and digest.removesuffix(_EARLIER) not in named:
                self._objects.remove(each.key)

    def _of_task(self, digest: str) -> list[Listed]:
        return tried(lambda: self._objects.under(self._tasks + digest))

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
