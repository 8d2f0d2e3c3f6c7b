"""Copies of files that a shared store has: fetched when they are wanted, and let go where others need their room."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from swaplora_adapters.errors import StorageFullError
from swaplora_adapters.registry.changes import Changes
from swaplora_adapters.store.store import Store


class Copies:
    """One server's. Any thread may call."""

    def __init__(
        self, store: Store, changes: Changes, wanted: Callable[[], AbstractContextManager[Mapping[str, float]]]
    ) -> None:
        """While what `wanted` returns is open no digest comes to be in use that was not.

        It gives digest → when it was last used, in seconds since the epoch, infinity for what stays.
        """
        self._store = store
        self._changes = changes
        self._wanted = wanted
        self._lock = threading.Lock()
        self._read = Counter[str]()

    @contextmanager
    def held(self, digest: str) -> Iterator[None]:
        """Have the files of a digest lie here, and stay for as long as this is open. Raises what `bring` does."""
        with self._lock:
            self._read[digest] += 1
        try:
            self.bring(digest)
            yield
        finally:
            with self._lock:
                self._read[digest] -= 1
                self._read += Counter()  # forgets what is at 0

    def bring(self, digest: str) -> None:
        """Have the files of a digest lie here. Raises what `Store.bring` and `Changes.check_known` do."""
        if self._store.is_here(digest):
            return
        self._changes.check_known()
        while True:
            try:
                return self._store.bring(digest)
            except StorageFullError as error:
                if not self._make_room(digest):
                    message = f"{error}; all other copies of the shared store's files here are in use, or the last ones"
                    raise StorageFullError(message) from error

    def _make_room(self, digest: str) -> bool:
        """Let go of what was used least recently until there should be room for a digest; whether anything went."""
        lacking = max(1, self._store.lacking_bytes(digest))
        freed = 0
        with self._wanted() as used:
            last_used = dict(used)
        copies = self._store.copies()
        for each in sorted(copies, key=lambda each: (last_used.get(each, 0.0), copies[each])):
            if freed < lacking and last_used.get(each) != float("inf") and self._store.is_elsewhere(each):
                freed += self._let_go(each)
        return freed > 0

    def _let_go(self, digest: str) -> int:
        """How many bytes that frees, unless it is in use by now."""
        with self._changes, self._wanted() as used, self._lock:
            if used.get(digest) == float("inf") or self._read[digest]:
                return 0
            free = self._store.take_out(digest)
        return free()
