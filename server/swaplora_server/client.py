"""The HTTP client of the command line: one method per thing a person asks a running server for."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, BinaryIO, Self
from urllib.parse import quote

import httpx

Card = Mapping[str, Any]  # an adapter as the server describes it
Message = Mapping[str, str]  # {"role": …, "content": …}

# An upload is answered when it is durable, a delete when its memory is free, a token when its turn comes: all may take
# long. A server that is not there should show at once.
TIMEOUT = httpx.Timeout(600, connect=5)


class ClientError(Exception):
    """What went wrong, in one line that says what to do about it."""


class Client:
    """A connection to the server at `url`. Every method raises ClientError when the server refuses or is not there."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ClientError(f"{url} is not a server's address: it must begin with http:// or https://")
        headers = {"Authorization": f"Bearer {_for_header('the API key', api_key)}"} if api_key else {}
        self._url = url
        try:
            httpx.URL(url).host.encode("idna")  # which connecting does, too late to tell whose fault it is
            self._http = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT)
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ClientError(f"{url} is not a server's address: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def models(self) -> list[Card]:
        """What can be called now; the base is the one whose `parent` is None."""
        return list(self._json("GET", "/v1/models")["data"])

    def adapters(self) -> list[Card]:
        """The card of every adapter, from as many pages as the server makes of them."""
        cards: list[Card] = []
        while True:
            page = self._json("GET", "/v1/adapters", params={"after": cards[-1]["name"]} if cards else {})
            cards += page["data"]
            if not (page["data"] and page.get("has_more")):
                return cards

    def adapter(self, name: str) -> Card:
        """One adapter's card."""
        return self._json("GET", _path(name))

    def put_adapter(
        self,
        name: str,
        config: BinaryIO,
        weights: BinaryIO,
        *,
        create_only: bool = False,
        if_match: str | None = None,
        convert: str | None = None,
    ) -> Card:
        """Store a version of an adapter, sent as it is read from two open files; its card, once it is durable."""
        headers, files = _conditions(create_only, if_match), {"config": config, "weights": weights}
        return self._json("PUT", _path(name), headers=headers, params=_conversion(convert), files=files)

    def put_source(
        self,
        name: str,
        source: str,
        *,
        create_only: bool = False,
        if_match: str | None = None,
        convert: str | None = None,
    ) -> Card:
        """Have the server fetch a version of an adapter from `source` and store it; its card, once it is durable."""
        headers, body = _conditions(create_only, if_match), {"source": source}
        return self._json("PUT", _path(name), headers=headers, params=_conversion(convert), json=body)

    def pin_adapter(self, name: str, *, pinned: bool) -> Card:
        """Keep an adapter in memory, or no longer."""
        return self._json("PATCH", _path(name), json={"pinned": pinned})

    def set_current(self, name: str, version: int) -> Card:
        """Let a name stand for another of its versions."""
        return self._json("PATCH", _path(name), json={"current": version})

    def warm_adapter(self, name: str) -> Card:
        """Load an adapter, or the version in `name@2`, into memory; its card, once it is there."""
        return self._json("POST", f"{_path(name)}/warm")

    def inspect_adapter(self, name: str, *, against: str | None = None, intruders: bool = False) -> Mapping[str, Any]:
        """What an adapter, or the version in `name@2`, does to each module, and `warnings` about it."""
        params = ({} if against is None else {"against": against}) | ({"intruders": "true"} if intruders else {})
        return self._json("GET", f"{_path(name)}/inspect", params=params)

    def compose_adapter(
        self, name: str, scales: Mapping[str, float], method: str, **parameters: float | bool | None
    ) -> Card:
        """Have the server make an adapter of others, of which `scales` says how much; its card, once it is durable."""
        given = {key: value for key, value in parameters.items() if value is not None}
        listed = [{"name": other, "scale": scale} for other, scale in scales.items()]
        return self._json("POST", "/v1/merged", json={"name": name, "from": listed, "method": method} | given)

    def delete_adapter(self, name: str, *, version: int | None = None, timeout: float | None = None) -> bool:
        """Delete an adapter or a version. True once its memory is free; False if it is not within `timeout` seconds."""
        wanted = {"version": version, "timeout": timeout}
        params = {key: value for key, value in wanted.items() if value is not None}
        return self._send("DELETE", _path(name), params=params).status_code != httpx.codes.ACCEPTED

    def aliases(self) -> list[Mapping[str, Any]]:
        """Every alias with its targets."""
        return list(self._json("GET", "/v1/aliases")["data"])

    def set_alias(self, alias: str, targets: Mapping[str, Any]) -> Mapping[str, Any]:
        """Make or change an alias. `targets` is `{"target": …}` or `{"targets": [{"target": …, "weight": …}, …]}`."""
        return self._json("PUT", _alias_path(alias), json=targets)

    def delete_alias(self, alias: str) -> None:
        """Remove an alias."""
        self._send("DELETE", _alias_path(alias))

    def chat(self, model: str, messages: Sequence[Message]) -> Iterator[str]:
        """The answer to a conversation, piece by piece as it is generated."""
        body = {"model": model, "messages": messages, "stream": True}
        with _explained(self._url), self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.is_error:
                response.read()
            _check(response)
            yield from _pieces(response.iter_lines())

    def _json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        response = self._send(method, path, **request)
        try:
            content = response.json()
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise ClientError(f"what answers at {self._url} is not swaplora: check --url")
        return content

    def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        with _explained(self._url):
            response = self._http.request(method, path, **request)
        _check(response)
        return response


class Conversation:
    """What was said so far to `model`, which may change between two turns."""

    def __init__(self, client: Client, model: str) -> None:
        self.model = model
        self._client = client
        self._messages: list[Message] = []

    def say(self, text: str) -> Iterator[str]:
        """The answer to `text`, piece by piece. A turn that is not heard to its end leaves no trace."""
        turn = [*self._messages, {"role": "user", "content": text}]
        pieces = []
        for piece in self._client.chat(self.model, turn):
            pieces.append(piece)
            yield piece
        self._messages = [*turn, {"role": "assistant", "content": "".join(pieces)}]

    def reset(self) -> None:
        """Forget what was said."""
        self._messages = []


def _path(name: str) -> str:
    return f"/v1/adapters/{quote(name, safe='')}"


def _alias_path(alias: str) -> str:
    return f"/v1/aliases/{quote(alias, safe='')}"


def _conversion(convert: str | None) -> dict[str, str]:
    return {} if convert is None else {"convert": convert}


def _conditions(create_only: bool, if_match: str | None) -> dict[str, str]:
    """The headers under which an upload is to be refused."""
    headers = {"If-None-Match": "*"} if create_only else {}
    if if_match is not None:
        headers["If-Match"] = f'"{_for_header("the digest to match", if_match)}"'
    return headers


def _for_header(what: str, value: str) -> str:
    """`value`, which an HTTP header can carry. Raises ClientError, which does not show it: it may be a key."""
    if not (value.isascii() and value.isprintable()):
        raise ClientError(f"{what} has a character in it that is not printable ASCII: check how it was given")
    return value


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
    if isinstance(content, dict) and isinstance(content.get("error"), dict):
        raise ClientError(_explanation(content["error"]))
    raise ClientError(f"{response.url} answered {response.status_code} {response.reason_phrase}")


def _explanation(error: Mapping[str, Any]) -> str:
    """An error object of the API as one printable line: its message, its code, and what a caller without a key does."""
    remedy = ": give --api-key or set SWAPLORA_API_KEY" if error.get("code") == "invalid_api_key" else ""
    words = f"{error.get('message')} ({error.get('code')}){remedy}"
    return " ".join("".join(char if char.isprintable() else " " for char in words).split())


def _pieces(lines: Iterable[str]) -> Iterator[str]:
    """The text in a stream of chat completion chunks, until `[DONE]`. Raises ClientError on an error event."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        chunk = json.loads(data)
        if "error" in chunk:
            raise ClientError(_explanation(chunk["error"]))
        yield from (text for choice in chunk["choices"] if (text := choice["delta"].get("content")))
    raise ClientError("the answer broke off: the server ended the stream early")
