"""The OpenAPI document is whole in itself, and nothing that is sent after it, or against it, makes the server fail."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fuzz_api import ALIAS, KEY, STORED, Fuzzer, fuzzed
from serving import BASE, Running, serving, settings
from swaplora_server.http.pages.routes_page import page_of

NUM_CASES, NUM_EDGES = 1400, 30  # of the cases at most so many edges an operation
# what the fields beside the one under test are, as JSON, so that it is that one which is looked at
SOUND = {
    "model": f'"{STORED}"',
    **dict.fromkeys(("prompt", "input", "query", "text_1", "text_2"), '"hi"'),
    "messages": '[{"role": "user", "content": "hi"}]',
    "documents": '["hi"]',
    "tokens": "[5]",
    **dict.fromkeys(("max_tokens", "max_output_tokens", "top_k"), "1"),
    **dict.fromkeys(("name", "lora_name", "lora_path", "src"), '"other"'),
    "source": '"file:other"',
    "target": f'"{STORED}"',
    "pinned": "false",
    "from": '[{"name": "nobody"}]',
    "members": f'["{STORED}", "nobody"]',
    "task": '[{"prompt": "hi", "answer": "ho"}]',
    "models": f'["{STORED}"]',
    "min_score": "0",
}
# of what a body need not have, these alone are sent
ALSO = frozenset({"model", "text_1", "text_2", "max_tokens", "max_output_tokens", "target", "pinned"})
# where sound bodies are refused: these name what is not there, sources that are not allowed, or a base without classes
REFUSED = {
    ("put", "/v1/adapters/{name}"),
    *(("post", f"/v1/{path}") for path in ("merged", "mixtures", "mixtures/{name}/trace", "keys")),
    *(("post", f"/v1/{verb}_lora_adapter") for verb in ("load", "unload")),
    *(("post", path) for path in ("/classify", "/adapters", "/lora-adapters")),
}
OURS, ANTHROPICS = frozenset({"message", "type", "param", "code"}), frozenset({"message", "type"})
# no JSON, or more of it than is read: which field has it makes no difference
UNREADABLE = ["1" * 5000, '"\\ud800"', '["\\udfff"]', "[" * 10_000, "[" * 10_000 + "]" * 10_000, '{"a":' * 10_000]
FEW = ["null", "true", "-1", '""', "[]", "{}"]
HOSTILE = [
    *FEW,
    *("false", "0", "1.5", '"1"', "[null]", '{"a": 1}', "[[[]]]", "[2147483647]"),
    *("NaN", "-Infinity", "1e400", "-0.0", str(2**31), str(2**63), str(-(2**63) - 1)),
    *('"\\u0000"', '"' + "x" * 2**20 + '"', "[" + "1," * 100_000 + "1]"),
    *('[{"role": 1, "content": {}}]', '[{"target": "tuned", "weight": true}]'),
]


@pytest.fixture(scope="module")
def document(server: Running) -> dict[str, Any]:
    found: dict[str, Any] = server.client.get("/openapi.json").json()
    return found


def store(server: Running, folder: Path) -> None:
    """An adapter and an alias, as far as what was sent before has left them there."""
    server.put(STORED, folder)
    server.client.put(f"/v1/aliases/{ALIAS}", json={"target": STORED})


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value."""
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes(child)


def json_schemas(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, path and schema of every operation with a JSON body, and of each of its bodies if several."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {})
            if "application/json" in content:
                schema = content["application/json"]["schema"]
                yield from ((method, path, one) for one in schema.get("oneOf", [schema]))


def test_every_reference_leads_somewhere_in_the_document(document: dict[str, Any]) -> None:
    references = [node["$ref"] for node in nodes(document) if "$ref" in node]
    assert document["paths"]
    for reference in references:
        root, *keys = reference.split("/")
        assert root == "#"
        target: Any = document
        for key in keys:
            target = target[key.replace("~1", "/").replace("~0", "~")]
        assert isinstance(target, dict), reference


def test_a_model_inside_a_body_is_described_where_it_stands(document: dict[str, Any]) -> None:
    schemas = {path: schema for method, path, schema in json_schemas(document) if method in ("put", "post")}
    message = schemas["/v1/chat/completions"]["properties"]["messages"]["items"]
    assert {"role", "content"} <= set(message["properties"])
    assert "$defs" not in str(schemas)


def test_what_a_number_may_be_and_null_are_told_where_they_hold(document: dict[str, Any]) -> None:
    for _, path, schema in json_schemas(document):
        for name, field in schema.get("properties", {}).items():
            assert not {"ge", "le", "gt", "lt"} & set(json.dumps(field).split('"')), (path, name)
    fields = {path: schema for _, path, schema in json_schemas(document)}["/v1/completions"]["properties"]
    bounds, null = fields["min_tokens"]["anyOf"]
    assert (bounds["minimum"], bounds["type"], null) == (0, "integer", {"type": "null"})


def test_the_page_has_every_route_and_field_and_needs_no_other_server(
    server: Running, document: dict[str, Any]
) -> None:
    answer = server.client.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for path, operations in document["paths"].items():
        for method in operations:
            assert f"<code>{method.upper()} {path}</code>" in answer.text
    for _, _, schema in json_schemas(document):
        for field in schema.get("properties", {}):
            assert f"<code>{field}</code>" in answer.text
    assert not re.search(r"(src|href)=.?(https?:)?//|<script|@import|url\(", answer.text)


def test_the_page_says_nothing_that_is_not_escaped() -> None:
    evil = "<script>"
    field = {"enum": [evil], "title": evil}
    body = {"content": {evil: {"schema": {"properties": {evil: field}, "required": [evil]}}}}
    parameter = {"name": evil, "in": "query", "schema": {"type": evil, "default": evil}}
    operation = {"description": evil, "parameters": [parameter], "requestBody": body}
    page = page_of({"info": {"title": evil}, "servers": [{"url": evil}], "paths": {evil: {"get": operation}}})
    assert evil not in page
    assert page.count("&lt;script&gt;") >= 8


def test_the_page_is_behind_the_key_and_below_the_proxys_path(base: Path, tmp_path: Path) -> None:
    with serving(settings(base, tmp_path, api_key=("secret",), root_path="/models")) as locked:
        assert locked.client.get("/docs").status_code == 401
        page = locked.client.get("/models/docs", headers={"Authorization": "Bearer secret"})
        assert "<code>GET /models/v1/models</code>" in page.text
        assert 'href="/models/openapi.json"' in page.text


def test_every_answer_is_as_the_document_says_whatever_is_asked(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    """`make fuzz` asks more."""
    with serving(fuzzed(base, tmp_path)) as locked:
        fuzzer = Fuzzer(locked, adapters[4])
        paths = locked.client.get("/openapi.json").json()["paths"]
        assert len(fuzzer.operations) == sum(map(len, paths.values()))
        fuzzer.cover(NUM_EDGES)
        fuzzer.draw(NUM_CASES, seed=0)
        assert fuzzer.findings.num_cases == NUM_CASES
        assert not fuzzer.findings.wrong, str(fuzzer.findings)
        assert {200, 400, 404, 405} <= set(fuzzer.findings.statuses)


def test_the_document_asks_for_a_key_where_one_is_needed(base: Path, tmp_path: Path, document: dict[str, Any]) -> None:
    assert not [node for node in nodes(document) if "security" in node or "securitySchemes" in node]
    with serving(fuzzed(base, tmp_path)) as locked:
        found = locked.client.get("/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
        assert {*found["components"]["securitySchemes"]} == {"key", "x-api-key"}
        for path, operations in found["paths"].items():
            for method, operation in operations.items():
                answer = locked.client.request(
                    method, path.format(name=STORED, model=STORED, alias=ALIAS, key_id="x", evaluation_id="x")
                )
                assert (answer.status_code == 401) == bool(operation["security"]), (method, path)


def test_a_method_that_is_not_served_is_told_all_that_are(server: Running, document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        answer = server.client.request(
            "TRACE", path.format(name=STORED, model=STORED, alias=ALIAS, key_id="x", evaluation_id="x")
        )
        assert answer.status_code == 405
        assert answer.headers["Allow"] == ", ".join(sorted(method.upper() for method in operations)), path


def test_no_value_in_any_field_of_any_body_makes_the_server_fail(
    server: Running, adapters: list[Path], document: dict[str, Any]
) -> None:
    """Bodies that describe a field alike refuse the same: of what one has refused, the others are asked a few."""
    unlike = {json.dumps(schema): (method, path, schema) for method, path, schema in json_schemas(document)}
    left: dict[tuple[str, str], list[str]] = {}
    for method, path, schema in unlike.values():  # several paths may be one route
        store(server, adapters[4])
        url = path.format(name=STORED, alias=ALIAS, evaluation_id="x")
        is_sound = server.client.request(method, url, **body(schema)).is_success
        assert is_sound != ((method, path) in REFUSED), (method, path)
        error = ANTHROPICS if path.startswith("/v1/messages") else OURS
        fields = schema.get("properties", {})
        for raw in UNREADABLE if fields else ():
            assert_is_told(server.client.request(method, url, **body(schema, next(iter(fields)), raw)), path, error)
        for field, described in fields.items():
            alike, passed = (field, json.dumps(described)), []
            for raw in left.get(alike, HOSTILE):
                answer = server.client.request(method, url, **body(schema, field, raw))
                assert_is_told(answer, (method, path, field, raw[:50]), error)
                passed += [raw] if answer.is_success else []
            if is_sound:
                left.setdefault(alike, [*FEW, *(raw for raw in passed if raw not in FEW)])
    assert server.token_ids(BASE, [5], 1)


def body(schema: dict[str, Any], field: str = "", raw: str = "") -> dict[str, Any]:
    """A sound JSON body, in which `field` is `raw`; where it has a sound value too, that comes first."""
    names = [name for name in schema.get("properties", ()) if name in schema.get("required", ()) or name in ALSO]
    fields = [(name, SOUND[name]) for name in names] + ([(field, raw)] if field else [])
    text = ", ".join(f'"{name}": {value}' for name, value in fields)
    return {"content": f"{{{text}}}".encode(), "headers": {"Content-Type": "application/json"}}


def assert_is_told(answer: httpx.Response, case: object, error: frozenset[str]) -> None:
    """Done, or refused in the one error body, which has what is in `error`."""
    assert answer.status_code < 500, (case, answer.text)
    if answer.is_error:
        assert error == set(answer.json()["error"]), (case, answer.text)
