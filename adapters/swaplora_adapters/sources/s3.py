"""Adapters from an S3-compatible store. Endpoint, region and credentials are those that boto3 finds by itself."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, ConnectTimeoutError, ReadTimeoutError
from urllib3.exceptions import HTTPError, TimeoutError

from swaplora_adapters.config.parse import MAX_CONFIG_BYTES
from swaplora_adapters.errors import AdapterError, SourceFailedError, SourceNotFoundError
from swaplora_adapters.files.complaints import quoted
from swaplora_adapters.files.naming import CONFIG_FILE
from swaplora_adapters.sources import transfer
from swaplora_adapters.sources.transfer import (
    CHUNK_BYTES,
    NUM_TRIES,
    Deadline,
    TransientError,
    missing,
    reading,
    receive,
    with_retries,
)
from swaplora_adapters.sources.uri import ObjectUri
from swaplora_adapters.store.staging import FILE_NAMES, Part, Staging

_BAD_CREDENTIALS = frozenset(
    {"ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch", "TokenRefreshRequired"}
)
_CREDENTIALS_HINT = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"


def fetch_from_object_store(uri: ObjectUri, staging: Staging, max_weights_bytes: int, deadline: Deadline) -> str:
    """Read both objects as they are at one moment; returns the URI with the version or ETag of the weights.

    Raises SourceNotFoundError, SourceFailedError, AdapterTooLargeError, StorageFullError.
    """
    with closing(_client(uri)) as client:
        state = with_retries(lambda: _read_both(client, uri, staging, max_weights_bytes, deadline), deadline)
    return f"{uri} ({state})"


def _client(uri: ObjectUri) -> Any:
    """A client of its own for every fetch: a session is not to be shared between threads."""
    config = Config(
        connect_timeout=transfer.CONNECT_SECONDS,
        read_timeout=transfer.READ_SECONDS,
        retries={"total_max_attempts": NUM_TRIES, "mode": "standard"},
    )
    step = f"{uri}: opening the store"
    try:
        return boto3.session.Session().client("s3", config=config)
    except BotoCoreError as error:
        raise SourceFailedError(f"{step}: {type(error).__name__}; check the AWS_ variables and files") from None
    except ValueError:  # how botocore refuses an endpoint
        raise SourceFailedError(f"{step}: the endpoint is no URL; check AWS_ENDPOINT_URL_S3") from None


def _read_both(client: Any, uri: ObjectUri, staging: Staging, max_weights_bytes: int, deadline: Deadline) -> str:
    """The config is looked at again after the weights came, so what was read is a pair that lay there together."""
    before = _read(client, uri, staging, "config", MAX_CONFIG_BYTES, deadline)
    weights = _read(client, uri, staging, "weights", max_weights_bytes, deadline)
    step = f"{uri}: checking {CONFIG_FILE} again"
    with _told(step, "config"):
        after = client.head_object(Bucket=uri.bucket, Key=uri.key(CONFIG_FILE))
    if after.get("ETag") != before.get("ETag"):
        raise TransientError(f"{step}: still being replaced")
    return _state_of(weights)


def _read(
    client: Any, uri: ObjectUri, staging: Staging, part: Part, max_bytes: int, deadline: Deadline
) -> dict[str, Any]:
    """Write one object to `staging`; returns what the store says of it."""
    step = reading(uri, part)
    with _told(step, part):
        answer: dict[str, Any] = client.get_object(Bucket=uri.bucket, Key=uri.key(FILE_NAMES[part]))
    with answer["Body"] as body:  # urllib3's own, which gives what has come; boto's wrapper waits for a whole chunk
        receive(deadline.over(_chunks(body, answer.get("ContentLength"), step), step), staging, part, max_bytes, step)
    return answer


def _chunks(body: Any, declared: int | None, step: str) -> Iterator[bytes]:
    """Tries within botocore end where a body begins, and so does its look at the length: both are ours."""
    num_bytes = 0
    try:
        while chunk := body.read1(CHUNK_BYTES):
            num_bytes += len(chunk)
            yield chunk
    except TimeoutError:
        raise TransientError(f"{step}: timed out") from None
    except HTTPError:
        raise TransientError(f"{step}: the connection broke off") from None
    if declared not in (None, num_bytes):
        raise TransientError(f"{step}: the connection broke off")


def _state_of(answer: dict[str, Any]) -> str:
    version = answer.get("VersionId", "null")  # which is what the store says while it keeps no versions
    kind, value = ("etag", answer.get("ETag", "")) if version == "null" else ("version", version)
    return f"{kind} {quoted(value.strip(chr(34)))[1:-1]}"


@contextmanager
def _told(step: str, part: Part) -> Iterator[None]:
    """Turn botocore's errors, after its own tries, into ours. Their texts hold endpoints and are not passed on."""
    try:
        yield
    except ClientError as error:
        raise _refusal(error, step, part) from None
    except (ConnectTimeoutError, ReadTimeoutError):
        raise SourceFailedError(f"{step}: timed out after {NUM_TRIES} tries") from None
    except BotoCoreError as error:
        raise SourceFailedError(
            f"{step}: {type(error).__name__}; {_CREDENTIALS_HINT}, and AWS_ENDPOINT_URL_S3 for a store of your own"
        ) from None


def _refusal(error: ClientError, step: str, part: Part) -> AdapterError:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = error.response.get("Error", {}).get("Code", "")
    if code == "NoSuchBucket":
        return SourceNotFoundError(f"{step}: there is no such bucket")
    if status == 404:
        return missing(step, part)
    if code in _BAD_CREDENTIALS:
        return SourceFailedError(f"{step}: the store refused the credentials ({code}); {_CREDENTIALS_HINT}")
    if status in (401, 403):
        return SourceFailedError(
            f"{step}: access is denied; the credentials want s3:GetObject there, "
            "and s3:ListBucket so that a missing object is not reported as a forbidden one"
        )
    return SourceFailedError(f"{step}: HTTP {status} ({quoted(str(code))[1:-1]})")
