"""Whether what a client said is what the server said to it, and of each adapter something else than of the base.

The request that a client sent is sent once more, by hand and not as a stream: what comes is what the client must have
told its user. Everything is greedy, and a row has the same bits in any company, so the two are equal.
"""

import base64
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx

from wiretap import Heard

FEATURES = ("chat", "streaming", "structured", "tools", "logprobs", "responses", "completion", "embeddings", "rerank")
YES, NONE, FAILED, NOT_RUN = "yes", "n/a", "FAILED", "not run"


class WrongError(Exception):
    """What a client said is not what it should have said; the message says how."""


@dataclass(frozen=True)
class Cell:
    """How one feature of a client fared, and what there is to say of it."""

    word: str
    note: str = ""


def judge_answer(
    server: httpx.Client, feature: str, model: str, told: Mapping[str, Any], heard: list[Heard], statuses: list[int]
) -> Any:
    """What was said, in a form that does for comparing it with what others say.

    Args:
        told: what the script says: `told`, or `error`.
        heard: the requests that the client sent meanwhile.
        statuses: of all that it was answered.

    Raises:
        WrongError: more than one request, another model's name, or not what the same request is answered by hand.
    """
    _hold(len(heard) == 1, f"{len(heard)} requests, answered {statuses}: {told.get('error', '')}")
    (request,) = heard
    _hold(request.body.get("model") == model, f"asked {request.body.get('model')!r} for {model!r}")
    by_hand = send_by_hand(server, request)
    _hold(not by_hand.is_error, f"refused: {by_hand.text}")
    _hold(set(statuses) == {200}, f"answered {statuses}")
    _hold("told" in told, f"{told.get('error')}, of {by_hand.text}")
    said, is_object = told["told"], feature == "structured" or "response_format" in request.body
    try:
        expected = said_by_hand("structured" if is_object else feature, request.path, by_hand.json())
    except ValueError as error:
        raise WrongError(f"cut off, or no JSON: {by_hand.text}") from error
    if feature == "streaming":
        _hold(len(said) > 1, f"one piece is no stream: {said}")
        said = "".join(said) if isinstance(said[-1], str) else said[-1]  # or an object that grows
    _hold(said == expected, f"said {said!r}, by hand {expected!r}")
    return said


def judge_feature(answers: Mapping[str, Any], base: str) -> Cell:
    """Of one feature, from what each model said."""
    alike = [model for model, said in answers.items() if model != base and said == answers[base]]
    return Cell(FAILED, f"{', '.join(alike)} said what the base says: {answers[base]!r}") if alike else Cell(YES)


def send_by_hand(server: httpx.Client, request: Heard) -> httpx.Response:
    """The same request once more, not as a stream."""
    whole = {name: value for name, value in request.body.items() if name not in ("stream", "stream_options")}
    return _post(server, request.path, json.dumps(whole))


def said_by_hand(feature: str, path: str, body: Mapping[str, Any]) -> Any:
    """The part of an answer that a feature is about."""
    if path == "/v1/embeddings":
        return _embedding(body)
    if path.endswith("/rerank"):
        return [[one["index"], one["relevance_score"]] for one in body["results"]]
    text, calls, logprobs = _READ[path](body)
    match feature:
        case "structured":  # some clients have it by a tool
            return json.loads(text) if text else next(iter(calls.values()))
        case "tools":
            return calls
        case "logprobs":
            return logprobs
        case _:
            return text


Parts = tuple[str, dict[str, Any], list[float]]  # text, arguments by tool, log-probabilities


def _chat(body: Mapping[str, Any]) -> Parts:
    (choice,) = body["choices"]
    calls = [call["function"] for call in choice["message"].get("tool_calls") or ()]
    arguments = {call["name"]: json.loads(call["arguments"]) for call in calls}
    logprobs = [token["logprob"] for token in (choice["logprobs"] or {}).get("content", ())]
    return choice["message"]["content"] or "", arguments, logprobs


def _completion(body: Mapping[str, Any]) -> Parts:
    (choice,) = body["choices"]
    return choice["text"], {}, (choice["logprobs"] or {}).get("token_logprobs", [])


def _response(body: Mapping[str, Any]) -> Parts:
    parts = [part for item in body["output"] if item["type"] == "message" for part in item["content"]]
    calls = {item["name"]: json.loads(item["arguments"]) for item in body["output"] if item["type"] == "function_call"}
    return "".join(part["text"] for part in parts), calls, []


def _message(body: Mapping[str, Any]) -> Parts:
    text = "".join(block["text"] for block in body["content"] if block["type"] == "text")
    return text, {block["name"]: block["input"] for block in body["content"] if block["type"] == "tool_use"}, []


def _embedding(body: Mapping[str, Any]) -> list[float]:
    """Its numbers, which some clients ask for as bytes."""
    (one,) = body["data"]
    written = one["embedding"]
    return list(struct.unpack(f"<{len(raw) // 4}f", raw)) if (raw := _bytes(written)) is not None else written


def _bytes(written: object) -> bytes | None:
    return base64.b64decode(written) if isinstance(written, str) else None


_READ = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/responses": _response,
    "/v1/messages": _message,
}


@cache  # several clients, and versions of one, send the same
def _post(server: httpx.Client, path: str, body: str) -> httpx.Response:
    return server.post(path, content=body, headers={"Content-Type": "application/json"})


def _hold(holds: bool, otherwise: str) -> None:
    if not holds:
        raise WrongError(otherwise)
