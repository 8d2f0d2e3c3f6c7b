"""Adapters from the Hugging Face hub, with huggingface_hub's own client, token and endpoint. Its cache is not used.

The addresses are those of its `model_info` and `hf_hub_url`. Its header builder is left alone, because that asks the
hub for more, and keeps the answer in the cache folder.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from urllib.parse import quote

import httpx2
from huggingface_hub import constants, get_session, get_token
from huggingface_hub.errors import OfflineModeIsEnabled, OIDCError

from swaplora_adapters.config.parse import MAX_CONFIG_BYTES
from swaplora_adapters.errors import AdapterError, SourceFailedError, SourceNotAllowedError, SourceNotFoundError
from swaplora_adapters.files.complaints import quoted
from swaplora_adapters.sources import transfer
from swaplora_adapters.sources.transfer import Deadline, TransientError, missing, reading, receive, with_retries
from swaplora_adapters.sources.uri import HubUri
from swaplora_adapters.store.staging import FILE_NAMES, Part, Staging

MAX_ANSWER_BYTES = 8 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BREAKS = (httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ProxyError)


def fetch_from_hub(uri: HubUri, staging: Staging, max_weights_bytes: int, deadline: Deadline) -> str:
    """Read both files at the commit that the revision stands for now; returns the URI with that commit.

    Raises SourceNotFoundError, SourceFailedError, SourceNotAllowedError, AdapterTooLargeError, StorageFullError.
    """
    pinned = uri.at(with_retries(lambda: _commit(uri, deadline), deadline))
    limits: dict[Part, int] = {"config": MAX_CONFIG_BYTES, "weights": max_weights_bytes}
    for part, max_bytes in limits.items():
        with_retries(partial(_read, uri, pinned, staging, part, max_bytes, deadline), deadline)
    return str(pinned)


def _commit(uri: HubUri, deadline: Deadline) -> str:
    step = f"{uri}: resolving the revision"
    url = f"{constants.ENDPOINT}/api/models/{uri.repo}/revision/{uri.revision}?expand=sha"
    reason = "there is no such repository or revision, or it is private and wants HF_TOKEN"
    with _asked(url, step, SourceNotFoundError(f"{step}: {reason}")) as response:
        repo, commit = _repo_and_commit(_body(deadline.over(response.iter_raw(), step), step), step)
    if repo.casefold() != uri.repo.casefold():  # it was renamed, and where it is now may not be allowed
        raise SourceNotAllowedError(f"{step}: the hub now has it as {quoted(repo)}; ask for that")
    return commit


def _repo_and_commit(body: bytes, step: str) -> tuple[str, str]:
    """What the hub calls the repository, and the commit."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    if isinstance(answer, dict):
        repo, commit = answer.get("id"), answer.get("sha")
        if isinstance(repo, str) and isinstance(commit, str) and _COMMIT.fullmatch(commit):
            return repo, commit
    raise SourceFailedError(f"{step}: the answer names no commit; check HF_ENDPOINT")


def _body(chunks: Iterable[bytes], step: str) -> bytes:
    body = bytearray()
    for chunk in chunks:
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise SourceFailedError(f"{step}: the answer is longer than {MAX_ANSWER_BYTES} bytes; check HF_ENDPOINT")
    return bytes(body)


def _read(uri: HubUri, pinned: HubUri, staging: Staging, part: Part, max_bytes: int, deadline: Deadline) -> None:
    step = reading(uri, part)
    path = quote("/".join((*pinned.folders, FILE_NAMES[part])))
    url = f"{constants.ENDPOINT}/{pinned.repo}/resolve/{pinned.revision}/{path}"
    with _asked(url, step, missing(step, part)) as response:
        receive(deadline.over(response.iter_raw(), step), staging, part, max_bytes, step)


@contextmanager
def _asked(url: str, step: str, not_found: SourceNotFoundError) -> Iterator[httpx2.Response]:
    """An answer that is a success, its body still to be read; the client gives no token to where it is redirected."""
    timeout = httpx2.Timeout(transfer.READ_SECONDS, connect=transfer.CONNECT_SECONDS)
    with (
        _told(step),
        get_session().stream("GET", url, headers=_headers(), timeout=timeout, follow_redirects=True) as response,
    ):
        if response.status_code != 200:
            raise _refusal(response, step, not_found)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise SourceFailedError(f"{step}: the hub sent it compressed, unasked")
        yield response


def _headers() -> dict[str, str]:
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    plain = {"Accept-Encoding": "identity"}  # so that the bytes counted are those of the file
    return plain | {"Authorization": f"Bearer {token}"} if token else plain


@contextmanager
def _told(step: str) -> Iterator[None]:
    """Turn the client's errors into ours. None of their texts is passed on: they hold URLs, which may be signed."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise SourceFailedError(f"{step}: HF_HUB_OFFLINE is set; unset it to fetch from the hub") from None
    except OIDCError:
        raise SourceFailedError(f"{step}: no token was given; check HF_OIDC_RESOURCE") from None
    except httpx2.TimeoutException:
        raise TransientError(f"{step}: timed out") from None
    except _BREAKS:
        raise TransientError(f"{step}: the connection failed or broke off") from None
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise SourceFailedError(f"{step}: {type(error).__name__}; check HF_ENDPOINT") from None


def _refusal(response: httpx2.Response, step: str, not_found: SourceNotFoundError) -> AdapterError | TransientError:
    """What an answer without the file means. To a stranger the hub answers 401 for what may not even exist."""
    status = response.status_code
    if status == 429 or status >= 500:
        return TransientError(f"{step}: HTTP {status}")
    if response.headers.get("X-Error-Code") == "GatedRepo":
        return SourceFailedError(f"{step}: the repository is gated; accept its terms and set HF_TOKEN")
    if status == 404 or (status == 401 and "Authorization" not in response.request.headers):
        return not_found
    if status in (401, 403):
        return SourceFailedError(f"{step}: access is denied (HTTP {status}); check HF_TOKEN")
    return SourceFailedError(f"{step}: HTTP {status}")
