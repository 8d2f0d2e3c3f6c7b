"""Objects in a bucket of an S3-compatible store that knows conditional writes (`If-None-Match: *`)."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from swaplora_adapters.files.disk import StoreError, raising_storage_errors
from swaplora_adapters.store.shared.objects import Listed
from swaplora_adapters.store.shared.trying import telling

CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 3.0  # of what is small
FILE_SECONDS = 30.0  # that nothing comes of a file, or that the store takes after the last of it
_FILE_TRIES = 4  # of each part of a file
_MISSING = "NoSuchKey"  # a plain 404 is of whatever stands before the store
_THERE = frozenset({"PreconditionFailed", "412"})
_CONFLICT = frozenset({"ConditionalRequestConflict", "409"})
T = TypeVar("T")


class BucketObjects:
    """See `Objects`. Endpoint, region and credentials are those that boto3 finds by itself."""

    def __init__(self, bucket: str, prefix: str) -> None:
        """StoreError where no client can be made."""
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._small, self._files = _client(ANSWER_SECONDS, 1), _client(FILE_SECONDS, _FILE_TRIES)

    def get(self, key: str) -> bytes | None:
        def read() -> bytes:
            content: bytes = self._small.get_object(**self._at(key))["Body"].read()
            return content

        return _unless_missing(read)

    def create(self, key: str, content: bytes) -> bool:
        with _told():
            try:
                self._small.put_object(**self._at(key), Body=content, IfNoneMatch="*")
                return True
            except ClientError as error:
                # where another is made at this moment there is one or there is none, and it is to be tried again
                if _code(error) in _THERE or (_code(error) in _CONFLICT and self.get(key) is not None):
                    return False
                raise

    def put(self, key: str, path: Path) -> None:
        with _told():
            self._files.upload_file(str(path), self._bucket, self._prefix + key)

    def fetch(self, key: str, path: Path) -> bool:
        def read() -> bool:
            body = self._files.get_object(**self._at(key))["Body"]
            with raising_storage_errors(), path.open("xb") as file:
                for chunk in body.iter_chunks(1 << 20):
                    file.write(chunk)
            return True

        return _unless_missing(read) or False

    def under(self, prefix: str) -> list[Listed]:
        now = datetime.now(UTC)
        with _told():
            pages = self._small.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            return sorted(  # some kinds of buckets list in no order
                Listed(each["Key"].removeprefix(self._prefix), (now - each["LastModified"]).total_seconds())
                for page in pages
                for each in page.get("Contents", [])
            )

    def remove(self, key: str) -> None:
        with _told():
            self._small.delete_object(**self._at(key))

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}


def _client(seconds: float, num_tries: int) -> Any:
    """What is small is tried once: whoever asks knows what may be tried again, and for how long."""
    retries = {"total_max_attempts": num_tries, "mode": "standard"}
    config = Config(connect_timeout=CONNECT_SECONDS, read_timeout=seconds, retries=retries)
    try:
        return boto3.session.Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise StoreError(
            f"the shared store's bucket cannot be asked ({type(error).__name__}): check the AWS_ variables and files"
        ) from None


def _unless_missing(read: Callable[[], T]) -> T | None:
    with _told():
        try:
            return read()
        except ClientError as error:
            if _code(error) == _MISSING:
                return None
            raise


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _told() -> AbstractContextManager[None]:
    """The texts of these errors, which have no root in common, hold endpoints."""

    def told(error: Exception) -> str:
        if not isinstance(error, ClientError):
            return f"the shared store does not answer ({type(error).__name__})"
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return f"the shared store answered HTTP {status} ({_code(error)[:64]!a})"

    return telling(Exception, told)
