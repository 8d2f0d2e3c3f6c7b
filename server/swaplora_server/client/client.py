"""The client: one method for each thing a person asks for.

Generating stays with OpenAI's own client. Calls block: asynchronous code has `asyncio.to_thread`. Several threads may
share a Client.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, BinaryIO, Self
from urllib.parse import quote

import httpx

from swaplora_server.client.connection import TIMEOUT_SECONDS, ClientError, Connection, for_header, refusal

Card = Mapping[str, Any]  # an adapter as the server describes it: docs/api.md lists what it has
Task = str | Sequence[Mapping[str, Any]]  # JSONL, or its objects
Message = Mapping[str, str]  # {"role": …, "content": …}

LOOK_SECONDS = 0.5  # between looks at what takes long


class Client:
    """A connection to the server at `url`. Every method raises ClientError when the server refuses or is not there.

    A context manager, or ended by `close`.
    """

    def __init__(
        self, url: str, api_key: str | None = None, *, timeout: float = TIMEOUT_SECONDS, retries: int = 2
    ) -> None:
        """`timeout` is how many seconds the server may be silent. A server that says when to ask again is asked again.

        It is waited for as long as it says, and asked `retries` more times at most. Raises ClientError for what is no
        address and for a key that no header can carry.
        """
        self._server = Connection(url, api_key, timeout, retries)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections; no method can be called any more."""
        self._server.close()

    def models(self) -> list[Card]:
        """What can be called now; the base is the one whose `parent` is None."""
        return list(self._server.json("GET", "/v1/models")["data"])

    def adapters(self) -> list[Card]:
        """The card of every adapter, from as many pages as the server makes of them."""
        cards: list[Card] = []
        while True:
            page = self._server.json("GET", "/v1/adapters", params={"after": cards[-1]["name"]} if cards else {})
            cards += page["data"]
            if not (page["data"] and page.get("has_more")):
                return cards

    def adapter(self, name: str) -> Card:
        """One adapter's card."""
        return self._server.json("GET", _path(name))

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
        return self._server.json("PUT", _path(name), headers=headers, params=_conversion(convert), files=files)

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
        return self._server.json("PUT", _path(name), headers=headers, params=_conversion(convert), json=body)

    def pin_adapter(self, name: str, *, pinned: bool) -> Card:
        """Keep an adapter in memory, or no longer."""
        return self._server.json("PATCH", _path(name), json={"pinned": pinned})

    def set_current(self, name: str, version: int, *, force: bool = False) -> Card:
        """Let a name stand for another of its versions; by `force` for one that has not passed its gate."""
        params = {"force": "true"} if force else {}
        return self._server.json("PATCH", _path(name), params=params, json={"current": version})

    def gate(self, name: str) -> Mapping[str, Any]:
        """What new versions of an adapter must show, and what each version has."""
        return self._server.json("GET", f"{_path(name)}/gate")

    def set_gate(
        self,
        name: str,
        task: Task,
        min_score: float,
        *,
        must_keep: tuple[Task, float] | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Mapping[str, Any]:
        """Have new versions be current only once they reach `min_score` of `task`.

        `must_keep` is another task, and how much lower they may score at it than the current version.
        """
        body: dict[str, Any] = {"task": task, "min_score": min_score, "stop": list(stop)}
        body |= {} if must_keep is None else {"must_keep": {"task": must_keep[0], "max_drop": must_keep[1]}}
        body |= {} if max_tokens is None else {"max_tokens": max_tokens}
        return self._server.json("PUT", f"{_path(name)}/gate", json=body)

    def remove_gate(self, name: str) -> None:
        """Have new versions be current at once again."""
        self._server.send("DELETE", f"{_path(name)}/gate")

    def share_adapter(self, name: str, shared_with: Sequence[str]) -> Card:
        """Let these tenants ask an adapter, and no others; `["*"]` is everybody, `[]` nobody else."""
        return self._server.json("PATCH", _path(name), json={"shared_with": [*shared_with]})

    def warm_adapter(self, name: str) -> Card:
        """Load an adapter, or the version in `name@2`, into memory; its card, once it is there."""
        return self._server.json("POST", f"{_path(name)}/warm")

    def inspect_adapter(self, name: str, *, against: str | None = None, intruders: bool = False) -> Mapping[str, Any]:
        """What an adapter, or the version in `name@2`, does to each module, and `warnings` about it."""
        params = ({} if against is None else {"against": against}) | ({"intruders": "true"} if intruders else {})
        return self._server.json("GET", f"{_path(name)}/inspect", params=params)

    def compose_adapter(
        self, name: str, scales: Mapping[str, float], method: str, **parameters: float | bool | None
    ) -> Card:
        """Have the server make an adapter of others, of which `scales` says how much; its card, once it is durable."""
        given = {key: value for key, value in parameters.items() if value is not None}
        listed = [{"name": other, "scale": scale} for other, scale in scales.items()]
        return self._server.json("POST", "/v1/merged", json={"name": name, "from": listed, "method": method} | given)

    def delete_adapter(self, name: str, *, version: int | None = None, timeout: float | None = None) -> bool:
        """Delete an adapter or a version. True once its memory is free; False if it is not within `timeout` seconds."""
        wanted = {"version": version, "timeout": timeout}
        params = {key: value for key, value in wanted.items() if value is not None}
        return self._server.send("DELETE", _path(name), params=params).status_code != httpx.codes.ACCEPTED

    def aliases(self) -> list[Mapping[str, Any]]:
        """Every alias with its targets."""
        return list(self._server.json("GET", "/v1/aliases")["data"])

    def alias(self, alias: str) -> Mapping[str, Any]:
        """One alias with its targets."""
        return self._server.json("GET", _alias_path(alias))

    def set_alias(self, alias: str, targets: Mapping[str, Any]) -> Mapping[str, Any]:
        """Make or change an alias. `targets` is `{"target": …}` or `{"targets": [{"target": …, "weight": …}, …]}`."""
        return self._server.json("PUT", _alias_path(alias), json=targets)

    def delete_alias(self, alias: str) -> None:
        """Remove an alias."""
        self._server.send("DELETE", _alias_path(alias))

    def mixtures(self) -> list[Mapping[str, Any]]:
        """Every mixture with its members."""
        return list(self._server.json("GET", "/v1/mixtures")["data"])

    def mixture(self, name: str) -> Mapping[str, Any]:
        """One mixture with its members."""
        return self._server.json("GET", _mixture_path(name))

    def put_mixture(
        self, name: str, members: Sequence[str], top_k: int, *, temperature: float = 1.0
    ) -> Mapping[str, Any]:
        """Make or change a mixture, of which each token takes the `top_k` members that are likest to it."""
        body = {"name": name, "members": list(members), "top_k": top_k, "temperature": temperature}
        return self._server.json("POST", "/v1/mixtures", json=body)

    def trace_mixture(self, name: str, prompt: str | Sequence[int]) -> Mapping[str, Any]:
        """Which members each token of a prompt takes, and how much of each, by layer and module."""
        given = prompt if isinstance(prompt, str) else list(prompt)
        return self._server.json("POST", f"{_mixture_path(name)}/trace", json={"prompt": given})

    def delete_mixture(self, name: str) -> None:
        """Remove a mixture. Its members stay."""
        self._server.send("DELETE", _mixture_path(name))

    def begin_evaluation(
        self,
        task: Task,
        models: Sequence[str],
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Mapping[str, Any]:
        """Have a task, JSONL or its objects, asked of models; the evaluation, which has hardly begun."""
        body = {"task": task, "models": list(models), "stop": list(stop)}
        return self._server.json(
            "POST", "/v1/evaluations", json=body | ({} if max_tokens is None else {"max_tokens": max_tokens})
        )

    def evaluation(self, name: str) -> Mapping[str, Any]:
        """One evaluation by its id, with what has come of it."""
        return self._server.json("GET", _evaluation_path(name))

    def evaluations(self) -> list[Mapping[str, Any]]:
        """Every evaluation, newest first, without results."""
        return list(self._server.json("GET", "/v1/evaluations", params={"limit": 1000})["data"])

    def wait_for_evaluation(
        self, name: str, told: Callable[[Mapping[str, Any]], None] = lambda _evaluation: None
    ) -> Mapping[str, Any]:
        """The evaluation once it has ended, however; until then `told` hears now and then how far it is."""
        while True:
            evaluation = self.evaluation(name)
            told(evaluation)
            if evaluation["ended"] is not None:
                return evaluation
            time.sleep(LOOK_SECONDS)

    def cancel_evaluation(self, name: str) -> Mapping[str, Any]:
        """End an evaluation; it keeps what has come."""
        return self._server.json("POST", f"{_evaluation_path(name)}/cancel")

    def delete_evaluation(self, name: str) -> None:
        """End an evaluation, and forget it."""
        self._server.send("DELETE", _evaluation_path(name))

    def chat(self, model: str, messages: Sequence[Message]) -> Iterator[str]:
        """The answer to a conversation, piece by piece as it is generated."""
        body = {"model": model, "messages": messages, "stream": True}
        with self._server.stream("POST", "/v1/chat/completions", json=body) as lines:
            yield from _pieces(lines)


def _path(name: str) -> str:
    return f"/v1/adapters/{quote(name, safe='')}"


def _evaluation_path(name: str) -> str:
    return f"/v1/evaluations/{quote(name, safe='')}"


def _mixture_path(name: str) -> str:
    return f"/v1/mixtures/{quote(name, safe='')}"


def _alias_path(alias: str) -> str:
    return f"/v1/aliases/{quote(alias, safe='')}"


def _conversion(convert: str | None) -> dict[str, str]:
    return {} if convert is None else {"convert": convert}


def _conditions(create_only: bool, if_match: str | None) -> dict[str, str]:
    """The headers under which an upload is to be refused."""
    headers = {"If-None-Match": "*"} if create_only else {}
    if if_match is not None:
        headers["If-Match"] = f'"{for_header("the digest to match", if_match)}"'
    return headers


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
            raise refusal(chunk["error"])
        yield from (text for choice in chunk["choices"] if (text := choice["delta"].get("content")))
    raise ClientError("the answer broke off: the server ended the stream early")
