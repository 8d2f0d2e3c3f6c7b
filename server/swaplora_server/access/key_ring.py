"""The keys that are good now: those of the settings, and those of a file that is read again when it changes."""

import hmac
import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from swaplora_adapters.files.naming import DEFAULT_TENANT
from swaplora_server.access.caller import ANYBODY, Caller, KeyScope
from swaplora_server.access.key_file import (
    KeyFile,
    KeyFileError,
    StoredKey,
    create_key,
    digest_of,
    read_keys,
    revoke_key,
)
from swaplora_server.access.limits import NO_LIMITS, TenantLimits

LOOK_SECONDS = 1.0
_Seen = tuple[int, int, int] | None


class _Known(NamedTuple):
    digest: str
    caller: Caller
    expires: float | None  # seconds since the epoch


class KeyRing:
    """Finds who comes with a key. Without keys and without a file everybody may do everything.

    Any thread may ask; between `start` and `stop` a thread looks after the file. One that has become unusable changes
    nothing: what was read last holds.
    """

    def __init__(
        self, keys: Sequence[str], file: Path | None = None, report: Callable[[str], None] = lambda _complaint: None
    ) -> None:
        """`keys` are for everything, of the default tenant. `report` hears what is wrong with the file, once each time.

        Raises KeyFileError for a file that cannot be used.
        """
        admin = frozenset({KeyScope.ADMIN})
        self._own = [
            _Known(digest_of(key), Caller(f"setting-{number}", DEFAULT_TENANT, admin), None)
            for number, key in enumerate(keys, start=1)
        ]
        self._file = file
        self._report = report
        self._seen = _seen(file)
        self._known = self._read()
        self._lock = threading.Lock()
        self._is_stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_open(self) -> bool:
        """Whether no key is asked for."""
        return self._file is None and not self._own

    def find(self, key: str | None) -> Caller | None:
        """Whose key it is; None for no key, and for one that is unknown or has expired.

        What is looked up is a hash, of which nobody can choose the beginning, so how long that takes says nothing.
        """
        if self.is_open:
            return ANYBODY
        if key is None:
            return None
        digest = digest_of(key)
        known = self._known.get(digest)
        if known is None or not hmac.compare_digest(known.digest, digest):
            return None
        return known.caller if known.expires is None or time.time() < known.expires else None

    def is_good(self, caller: Caller) -> bool:
        """Whether the key that `caller` came with still is one to generate with."""
        if self.is_open:
            return True
        now, known = time.time(), self._known.values()
        good = (k.caller for k in known if k.expires is None or now < k.expires)
        return any(
            (found.key_id, found.tenant) == (caller.key_id, caller.tenant) and found.may({KeyScope.GENERATE})
            for found in good
        )

    def has_tenant(self, tenant: str) -> bool:
        """Whether somebody can come for it: it has a key that is good now, or no key is asked for."""
        now, known = time.time(), self._known.values()
        is_good = (k.caller.tenant == tenant for k in known if k.expires is None or now < k.expires)
        return self.is_open or any(is_good)

    def tenant_limits(self, tenant: str) -> TenantLimits:
        """Of all keys of a tenant together."""
        callers = (known.caller for known in self._known.values())
        return next((caller.tenant_limits for caller in callers if caller.tenant == tenant), NO_LIMITS)

    def refresh(self) -> None:
        """Read the file again if it is another than the one that was last looked at."""
        with self._lock:  # or what was read before a change could be taken after it
            seen = _seen(self._file)
            if seen == self._seen:
                return
            self._seen = seen
            try:
                self._known = self._read()  # one assignment: who asks meanwhile sees the keys as they were or are
            except KeyFileError as error:
                self._report(str(error))

    def stored(self) -> tuple[StoredKey, ...]:
        """The keys of the file. Raises KeyFileError, and FileNotFoundError where there is none for keys."""
        return read_keys(self._path).keys

    def create(self, tenant: str, scopes: tuple[KeyScope, ...], expires: datetime | None) -> tuple[str, StoredKey]:
        """See `create_key`: one that is known at once. Raises FileNotFoundError as well.

        A file that is away is not made anew: with this key alone in it, it would shut out all others.
        """
        created = create_key(self._path, tenant, scopes, expires, must_exist=True)
        self.refresh()
        return created

    def revoke(self, key_id: str) -> None:
        """See `revoke_key`: one that is unknown at once. Raises FileNotFoundError as well."""
        revoke_key(self._path, key_id)
        self.refresh()

    @property
    def _path(self) -> Path:
        if self._file is None:
            raise FileNotFoundError
        return self._file

    def start(self) -> None:
        """Look after the file, if there is one, until `stop`."""
        if self._file is not None:
            self._thread = threading.Thread(target=self._watch, name="key-file", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._is_stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._is_stopping.wait(LOOK_SECONDS):
            self.refresh()

    def _read(self) -> dict[str, _Known]:
        stored = KeyFile() if self._file is None else read_keys(self._file)
        found = [
            _Known(key.sha256, stored.caller(key), key.expires.timestamp() if key.expires else None)
            for key in stored.keys
        ]
        return {known.digest: known for known in (*found, *self._own)}


def _seen(file: Path | None) -> _Seen:
    """What tells a file from the one that was there before."""
    try:
        status = None if file is None else os.stat(file)
    except OSError:
        return None
    return None if status is None else (status.st_ino, status.st_mtime_ns, status.st_size)
