"""The table of error codes: every code in it can be answered, and whatever can be raised is in it."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

import swaplora_adapters
import swaplora_server
from serving import Running
from swaplora_adapters.errors import AdapterError
from swaplora_server.engine.request import OVERDUE_CODE
from swaplora_server.http.errors import _HTTP_CODES, _STATUS, error_response
from swaplora_server.service.errors import RequestError

RAISING = ("RequestError", "error_body")  # whose first argument is a code


def subclasses(kind: type[AdapterError]) -> Iterator[type[AdapterError]]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def spoken_codes() -> set[str]:
    """The first argument, where it is a literal, of every call in the packages that takes a code."""
    found = set()
    for package in (swaplora_adapters, swaplora_server):
        for file in Path(package.__path__[0]).rglob("*.py"):
            calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call) and node.args]
            spoken = [call.args[0] for call in calls if getattr(call.func, "id", None) in RAISING]
            found |= {code.value for code in spoken if isinstance(code, ast.Constant) and isinstance(code.value, str)}
    return found


def test_every_code_of_the_table_can_be_answered_and_every_code_that_can_be_raised_is_in_it() -> None:
    of_classes = {kind.code for kind in subclasses(AdapterError)}
    named = {OVERDUE_CODE}  # the engine's, which is no literal where it is raised
    assert of_classes | spoken_codes() | set(_HTTP_CODES.values()) | named == _STATUS.keys()


@pytest.mark.parametrize("code", sorted(_STATUS))
def test_openais_client_asks_again_where_that_may_help_and_when_it_is_told_to(code: str) -> None:
    told = error_response(RequestError(code, "words")).headers
    answer = httpx2.Response(_STATUS[code], headers=dict(told))
    client = openai.OpenAI(base_url="http://localhost", api_key="key")
    asks_again = client._should_retry(answer)  # noqa: SLF001 - what is asked of it is its own rule
    in_vain = {"adapter_busy", "adapter_failed", "gate_failed", "deadline_exceeded", "storage_full", "storage_failed"}
    by_itself = _STATUS[code] in (408, 409, 429) or _STATUS[code] >= 500
    assert asks_again == (by_itself and code not in in_vain)
    if "retry-after" in told:
        waited = client._calculate_retry_timeout(1, openai._models.FinalRequestOptions(method="get", url="/"), told)  # type: ignore[arg-type]  # noqa: SLF001
        assert (waited, asks_again) == (float(told["retry-after"]), True)


def test_every_kind_of_adapter_error_has_a_code() -> None:
    kinds = list(subclasses(AdapterError))
    assert len(kinds) > 10
    assert AdapterError.code not in {kind.code for kind in kinds}


@pytest.mark.parametrize(
    ("method", "path", "headers", "message"),
    [
        ("GET", "/v1/adapters/nobody", {}, "there is no adapter called 'nobody'; GET /v1/adapters lists them"),
        ("DELETE", "/v1/adapters/nobody", {}, "there is no adapter called 'nobody'; GET /v1/adapters lists them"),
        ("GET", "/v1/aliases/nobody", {}, "there is no alias called 'nobody'; GET /v1/aliases lists them"),
        ("DELETE", "/v1/aliases/nobody", {}, "there is no alias called 'nobody'; GET /v1/aliases lists them"),
        (
            "PUT",
            "/v1/adapters/nobody",
            {"If-Match": "sha256:0"},
            "the adapter's current version is not the one that If-Match names",
        ),
    ],
)
def test_an_answer_says_what_to_ask_next(
    server: Running, adapters: list[Path], method: str, path: str, headers: dict[str, str], message: str
) -> None:
    if method == "PUT":
        answer = server.put("nobody", adapters[0], **headers)
    else:
        answer = server.client.request(method, path, headers=headers)
    assert answer.json()["error"]["message"] == message


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"messages": [{"role": "user", "content": "hi" * 5000}]}, 400, "this model's maximum context length is"),
        ({"max_tokens": 10**6}, 400, "this model's maximum context length is"),
        ({"model": "gone"}, 404, "there is no model"),
        ({"temperature": -1}, 400, "temperature"),
    ],
)
def test_litellm_knows_what_was_wrong(server: Running, fields: dict[str, Any], status: int, words: str) -> None:
    """It goes by the status, and for a text that is too long by words, which nothing else may have."""
    asked = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1} | fields
    answer = server.client.post("/v1/chat/completions", json=asked)
    assert answer.status_code == status
    said = answer.text.lower()
    assert words in said
    assert ("maximum context length is" in said) == ('"code":"context_length_exceeded"' in said)
