"""Fetching an adapter's two files from where the operator allows. Thread-safe; libraries are imported at first use."""

import threading
from collections.abc import Sequence
from pathlib import Path

from swaplora_adapters.cancellation import Cancellation
from swaplora_adapters.errors import SourceNotAllowedError
from swaplora_adapters.sources.folder import fetch_from_folder
from swaplora_adapters.sources.transfer import Deadline
from swaplora_adapters.sources.uri import FolderUri, HubUri, ObjectUri, Uri, parse_prefix, parse_uri
from swaplora_adapters.store.staging import Staging


class Sources:
    """What adapters may be fetched from: the adapter folder, and prefixes of the hub and of object stores."""

    def __init__(self, *, allowed: Sequence[str], folder: Path | None, max_weights_bytes: int) -> None:
        """`allowed` are prefixes, matched part by part; folders are allowed by giving the one they lie below.

        Raises SourceNotAllowedError, with a message for the operator, for a prefix that is written wrongly.
        """
        self._allowed = [parse_prefix(prefix) for prefix in allowed]
        self._folder = folder
        self._max_weights_bytes = max_weights_bytes
        self._is_stopping = threading.Event()

    def stop(self) -> None:
        """Let no fetch succeed from now on: those that run end with StoppingError at the next bytes that come."""
        self._is_stopping.set()

    def fetch(
        self, uri: str, staging: Staging, *, is_operators: bool = False, cancellation: Cancellation | None = None
    ) -> str:
        """Write the source's two files into `staging`; returns what to show as the source, pinned to what was read.

        A hub or store URI that `is_operators`, written by the operator or made of the resolver's template, needs no
        prefix that allows it. Raises SourceNotAllowedError, SourceNotFoundError, SourceFailedError,
        InvalidAdapterError, AdapterTooLargeError and StorageFullError, and WorkCancelledError at the next bytes
        that come after `cancellation`. The caller removes `staging`.
        """
        source = parse_uri(uri)
        deadline = Deadline(self._is_stopping, cancellation or Cancellation())
        pinned_uri = self._read(source, staging, deadline, is_operators=is_operators)
        deadline.check(source)
        return pinned_uri

    def _read(self, source: Uri, staging: Staging, deadline: Deadline, *, is_operators: bool) -> str:
        if isinstance(source, FolderUri):
            return self._from_folder(source, staging)
        if not is_operators and not any(source.parts[: len(prefix)] == prefix for prefix in self._allowed):
            raise SourceNotAllowedError(f"{source} is not an allowed source; allow it with --allow-source")
        if isinstance(source, HubUri):
            return self._from_hub(source, staging, deadline)
        return self._from_object_store(source, staging, deadline)

    def _from_folder(self, source: FolderUri, staging: Staging) -> str:
        if self._folder is None:
            raise SourceNotAllowedError(f"{source}: folders are not an allowed source; allow one with --adapter-dir")
        return fetch_from_folder(source, self._folder, staging, self._max_weights_bytes)

    def _from_hub(self, source: HubUri, staging: Staging, deadline: Deadline) -> str:
        from swaplora_adapters.sources.hub import fetch_from_hub

        return fetch_from_hub(source, staging, self._max_weights_bytes, deadline)

    def _from_object_store(self, source: ObjectUri, staging: Staging, deadline: Deadline) -> str:
        try:
            from swaplora_adapters.sources.s3 import fetch_from_object_store
        except ModuleNotFoundError:
            raise SourceNotAllowedError(f"{source}: s3:// needs boto3; pip install 'swaplora[s3]'") from None
        return fetch_from_object_store(source, staging, self._max_weights_bytes, deadline)
