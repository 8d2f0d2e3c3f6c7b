"""The audit log: a line of JSON for each change that a request asked for, appended and never touched again.

A line is on the disk (fsync) before the change is answered. One that cannot be written is handed to `report`, with all
that it says, and the change stands. The file is opened for each line, so that it may be moved away at any time.
"""

import json
import os
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from swaplora_server.access.caller import Caller

MAX_NAME_CHARS = 256


class AuditLogError(RuntimeError):
    """The audit log cannot be written; the message is for the operator."""


class AuditLog:
    """One file, or none. Any thread may write."""

    def __init__(self, file: Path | None, report: Callable[[str], None] = lambda _complaint: None) -> None:
        """Raises AuditLogError for a file that cannot be written."""
        self._file = file
        self._report = report
        self._lock = threading.Lock()
        if file is not None:
            try:
                os.close(_open(file))
            except OSError as error:
                raise AuditLogError(f"cannot write the audit log {file}: {error.strerror}") from error

    def write(
        self,
        caller: Caller,
        request_id: str,
        change: str,
        name: str,
        version: int | None,
        digest: str | None,
        outcome: str,
        shared_with: Sequence[str] | None = None,
    ) -> None:
        """Note a change of `name`, with version and digest if it came to be; `outcome` is done, or an error's code.

        `shared_with` are the tenants that were to have it.
        """
        if self._file is None:
            return
        told: dict[str, Any] = {
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "key": caller.key_id,
            "tenant": caller.tenant,
            "request": request_id,
            "change": change,
            "name": name[:MAX_NAME_CHARS],
            "version": version,
            "digest": digest,
            "outcome": outcome,
        }
        if shared_with is not None:
            told["shared_with"] = list(shared_with)
        line = json.dumps(told)
        try:
            with self._lock:
                _append(self._file, line.encode())
        except OSError as error:
            self._report(f"the audit log cannot be written ({error.strerror}): {line}")


def _open(file: Path) -> int:
    return os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _append(file: Path, line: bytes) -> None:
    """On a line of its own, also behind one that a full disk has cut."""
    descriptor = _open(file)
    try:
        size = os.fstat(descriptor).st_size
        is_cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        content = (b"\n" if is_cut else b"") + line + b"\n"
        if os.write(descriptor, content) < len(content):
            raise OSError(None, "no room for a whole line")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
