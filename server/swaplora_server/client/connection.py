"""HTTP to one server, which may ask to be asked again; what goes wrong is a ClientError."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx

# An upload is answered when it is durable, a delete when its memory is free, a token when its turn comes: all may take
# long. A server that is not there should show at once.
TIMEOUT_SECONDS = 600.0
CONNECT_SECONDS = 5.0
MAX_WAIT_SECONDS = 60.0  # before a further try


class ClientError(Exception):
    """What went wrong, in one line that says what to do about it.

    `status`, `code` and `param` are the server's: decide by the code, never by the words. All are None where no server
    answered, or something else than swaplora did.
    """

    def __init__(
        self, message: str, *, status: int | None = None, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


class Connection:
    """To the server at `url`. Every method but `close` raises ClientError when the server refuses or is not there."""

    def __init__(self, url: str, api_key: str | None, timeout: float, retries: int) -> None:
        """See `Client`."""
        if not url.startswith(("http://", "https://")):
            raise ClientError(f"{url} is not a server's address: it must begin with http:// or https://")
        headers = {"Authorization": f"Bearer {for_header('the API key', api_key)}"} if api_key else {}
        self._url = url
        self._retries = retries
        limits = httpx.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS))
        try:
            httpx.URL(url).host.encode("idna")  # which connecting does, too late to tell whose fault it is
            self._http = httpx.Client(base_url=url, headers=headers, timeout=limits)
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ClientError(f"{url} is not a server's address: {error}") from error

    def close(self) -> None:
        """Let go of what is open; nothing can be sent any more."""
        self._http.close()

    def json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        """The JSON object that the server answers with."""
        response = self.send(method, path, **request)
        try:
            content = response.json()
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise ClientError(f"what answers at {self._url} is not swaplora: check --url")
        return content

    def send(self, method: str, path: str, **request: Any) -> httpx.Response:
        """The server's answer, which has been read."""
        for num_left in range(self._retries, -1, -1):
            with _explained(self._url):
                response = self._http.request(method, path, **request)
            wait = _seconds_to_wait(response)
            if wait is None or not num_left or not _can_be_sent_again(request):
                break
            time.sleep(wait)
        _check(response)
        return response

    @contextmanager
    def stream(self, method: str, path: str, **request: Any) -> Iterator[Iterator[str]]:
        """The lines of the server's answer, as they come. Sent once."""
        with _explained(self._url), self._http.stream(method, path, **request) as response:
            if response.is_error:
                response.read()
            _check(response)
            yield response.iter_lines()


def for_header(what: str, value: str) -> str:
    """`value`, which an HTTP header can carry. Raises ClientError, which does not show it: it may be a key."""
    if not (value.isascii() and value.isprintable()):
        raise ClientError(f"{what} has a character in it that is not printable ASCII: check how it was given")
    return value


def refusal(error: Mapping[str, Any], status: int | None = None) -> ClientError:
    """An error object of the API as an exception, one printable line: its message, its code, and what to do."""
    remedy = ": give --api-key or set SWAPLORA_API_KEY" if error.get("code") == "invalid_api_key" else ""
    words = f"{error.get('message')} ({error.get('code')}){remedy}"
    line = " ".join("".join(char if char.isprintable() else " " for char in words).split())
    return ClientError(line, status=status, code=error.get("code"), param=error.get("param"))


def _seconds_to_wait(response: httpx.Response) -> float | None:
    """Before the same may be asked again, where the server did nothing and says so."""
    told = response.headers.get("retry-after", "") if response.is_error else ""
    return min(float(told), MAX_WAIT_SECONDS) if told.isascii() and told.isdecimal() else None


def _can_be_sent_again(request: Mapping[str, Any]) -> bool:
    """Files are read from their beginning once more."""
    return all(file.seekable() for file in request.get("files", {}).values())


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what can go wrong between here and the server into a ClientError."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ClientError(f"no server answers at {url}: start one with `swaplora serve`, or give its --url") from error
    except httpx.TimeoutException as error:
        raise ClientError(f"the server at {url} took too long to answer: try again, or look at its log") from error
    except httpx.TransportError as error:
        raise ClientError(f"the connection to {url} broke off: {error or type(error).__name__}") from error


def _check(response: httpx.Response) -> None:
    """Raise ClientError with the server's own words if it refused. The response has been read."""
    if not response.is_error:
        return
    try:
        content = response.json()
    except ValueError:
        content = None
    status = response.status_code
    if isinstance(content, dict) and isinstance(content.get("error"), dict):
        raise refusal(content["error"], status)
    raise ClientError(f"{response.url} answered {status} {response.reason_phrase}", status=status)
