"""What stands between clients and the routes: compressed bodies, HEAD, a proxy's path, SageMaker, unknown paths."""

import gzip
import json
import socket
import zlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving import BASE, Running, serving, settings
from swaplora_server.config_values import ROUTES_BEGIN
from swaplora_server.http.dependencies import ADAPTER_HEADER
from swaplora_server.http.refusals import UNSERVED

BODY = {"model": BASE, "prompt": "hi", "max_tokens": 1, "temperature": 0}
CHAT = {"model": BASE, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "temperature": 0}
RAW = json.dumps(BODY).encode()


@pytest.fixture(scope="module")
def loaded(server: Running, adapters: list[Path]) -> Running:
    server.put("tuned", adapters[4])
    return server


def post(server: Running, content: bytes, path: str = "/v1/completions", **headers: str) -> httpx.Response:
    sent = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return server.client.post(path, content=content, headers=sent)


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip"])
def test_a_body_that_is_gzip_says_what_it_says_plain(server: Running, encoding: str) -> None:
    answer = post(server, gzip.compress(RAW), Content_Encoding=encoding)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == post(server, RAW, Content_Encoding="identity").json()["choices"]


@pytest.mark.parametrize("encoding", ["deflate", "br", "zstd", "gzip, gzip", "x" * 5000])
def test_another_encoding_is_refused_by_name(server: Running, encoding: str) -> None:
    answer = post(server, gzip.compress(RAW), Content_Encoding=encoding)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert answer.json()["error"]["param"] == "Content-Encoding"
    assert "gzip" in answer.json()["error"]["message"]
    assert len(answer.content) < 1000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (RAW, "is not gzip"),
        (gzip.compress(RAW)[:-1], "cut short"),
        (b"", "cut short"),
        (gzip.compress(RAW) + b"x", "something follows"),
        (gzip.compress(RAW) * 2, "something follows"),
        (zlib.compress(RAW), "is not gzip"),
        (gzip.compress(RAW)[:-8] + b"\0" * 8, "is not gzip"),
    ],
    ids=range(7),
)
def test_what_is_not_whole_gzip_is_told(server: Running, content: bytes, words: str) -> None:
    answer = post(server, content, Content_Encoding="gzip")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    assert words in answer.json()["error"]["message"]


def bomb(num_bytes: int) -> bytes:
    """So many spaces, which JSON may begin with."""
    packer = zlib.compressobj(9, wbits=16 + zlib.MAX_WBITS)
    return b"".join(packer.compress(b" " * (1 << 20)) for _ in range(num_bytes >> 20)) + packer.flush()


def test_a_bomb_is_stopped_at_the_bound_of_decoded_bytes(base: Path, tmp_path: Path) -> None:
    with serving(settings(base, tmp_path, max_body_bytes=2000)) as small:
        padded = b" " * 1800 + RAW
        assert post(small, gzip.compress(padded), Content_Encoding="gzip").status_code == 200
        head, empty_block = gzip.compress(b"")[:10], b"\0\0\0\xff\xff"
        for content in (gzip.compress(b" " * 2000 + RAW), bomb(64 << 20), head + empty_block * 600):
            headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
            pieces = iter([content])  # sent in chunks, so that its length is not known before
            answer = small.client.post("/v1/completions", content=pieces, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_an_upload_may_be_gzip_too(server: Running, adapters: list[Path]) -> None:
    names = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}
    files = {part: (adapters[2] / name).read_bytes() for part, name in names.items()}
    plain = server.client.build_request("PUT", "/v1/adapters/packed", files=files)
    packed = gzip.compress(plain.read())
    kind = plain.headers["content-type"]
    headers = {"Content-Type": kind, "Content-Encoding": "gzip"}
    answer = server.client.put("/v1/adapters/packed", content=packed, headers=headers)
    assert answer.status_code == 201, answer.text
    server.put("plain", adapters[2])
    digests = {server.client.get(f"/v1/adapters/{name}").json()["digest"] for name in ("packed", "plain")}
    assert len(digests) == 1
    refused = server.client.put("/v1/adapters/packed", content=packed[:-1], headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_request")
    for name in ("packed", "plain"):
        server.client.delete(f"/v1/adapters/{name}")


def test_a_byte_order_mark_is_no_part_of_a_body(server: Running) -> None:
    assert post(server, b"\xef\xbb\xbf" + RAW).status_code == 200
    assert post(server, gzip.compress(b"\xef\xbb\xbf" + RAW), Content_Encoding="gzip").status_code == 200
    assert post(server, b"\xef\xbb\xbf" * 2 + RAW).status_code == 400


def test_head_is_answered_wherever_get_is_without_a_body(loaded: Running) -> None:
    paths = loaded.client.get("/openapi.json").json()["paths"]
    for path, operations in [*paths.items(), ("/openapi.json", {"get": {}}), ("/nowhere", {"get": {}})]:
        url = path.format(name="tuned", model="tuned", alias="nobody", key_id="x", evaluation_id="x")
        head = loaded.client.head(url)
        assert head.content == b""
        if "get" in operations:
            got = loaded.client.get(url)
            assert head.status_code == got.status_code, url
            assert head.headers["content-type" if got.content else "x-request-id"]
            assert set(head.headers) == set(got.headers)
        else:
            assert head.status_code == 405, url


def test_nothing_follows_the_headers_of_an_answer_to_head(loaded: Running) -> None:
    host, port = loaded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(b"HEAD /v1/models HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        received = b""
        while b'{"status":"ok"}' not in received:
            received += connection.recv(4096)
    first, _, second = received.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 200")
    assert second.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("path", ["", "/llm", "/a/b.c/~d"])
def test_a_proxys_path_is_served_whether_it_is_cut_off_or_not(base: Path, tmp_path: Path, path: str) -> None:
    with serving(settings(base, tmp_path, root_path=path)) as running:
        for prefix in ("", path):
            assert running.client.get(f"{prefix}/v1/models").status_code == 200
            assert post(running, RAW, f"{prefix}/v1/completions").status_code == 200
            assert running.client.get(f"{prefix}/health/ready").json() == {"ready": True}
            assert running.client.head(f"{prefix}/health").status_code == 200
            told = running.client.get(f"{prefix}/v1/audio/speech").json()["error"]["message"]
            assert told.startswith("'/v1/audio/speech' is not served yet")
        assert running.client.get("/other/v1/models").status_code == 404
        assert running.client.get(f"{path}x/v1/models").status_code == 404
        servers = running.client.get("/openapi.json").json().get("servers", [])
        assert servers == ([{"url": path}] if path else [])


@pytest.mark.parametrize("body", [BODY, CHAT, BODY | {"stream": True}, CHAT | {"stream": True}], ids=range(4))
def test_sagemakers_route_answers_as_the_route_of_its_body(loaded: Running, body: dict[str, Any]) -> None:
    own = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    answers = [post(loaded, json.dumps(body | {"model": "tuned"}).encode(), path) for path in ("/invocations", own)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].headers["x-swaplora-adapter"] == "tuned@1"
    assert answers[0].headers["content-type"] == answers[1].headers["content-type"]
    if "stream" in body:
        assert answers[0].text.endswith("data: [DONE]\n\n")
        assert answers[0].text.count("data: ") == answers[1].text.count("data: ")
    else:
        assert answers[0].json()["choices"] == answers[1].json()["choices"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": BASE}, None),
        (BODY | CHAT, None),
        ([], None),
        (BODY | {"prompt": 5}, "prompt"),
        (CHAT | {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (CHAT | {"tools": [{}]}, "tools[0].type"),
        (BODY | {"suffix": "x"}, "suffix"),
        ({"prompt": "x"}, "model"),
    ],
    ids=range(8),
)
def test_sagemakers_route_refuses_as_the_route_of_its_body(loaded: Running, body: Any, param: str | None) -> None:
    answer = post(loaded, json.dumps(body).encode(), "/invocations")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_sagemakers_header_names_the_adapter(loaded: Running) -> None:
    def invoke(model: str, adapter: str) -> httpx.Response:
        return loaded.client.post("/invocations", json=BODY | {"model": model}, headers={ADAPTER_HEADER: adapter})

    answer = invoke(BASE, "tuned")
    assert (answer.headers["x-swaplora-adapter"], answer.json()["model"]) == ("tuned@1", "tuned")
    assert invoke("tuned", "tuned").headers["x-swaplora-adapter"] == "tuned@1"
    empty = invoke(BASE, "")
    assert (empty.status_code, empty.json()["error"]["param"]) == (400, ADAPTER_HEADER)
    assert invoke(BASE, "nobody").status_code == 404
    assert invoke(BASE, "x" * 600).json()["error"]["code"] == "model_not_found"
    refused = invoke("tuned", "other")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
    headers = {ADAPTER_HEADER: "tuned"}
    for body in (BODY, CHAT):
        alone = {key: value for key, value in body.items() if key != "model"}
        answer = loaded.client.post("/invocations", json=alone, headers=headers)
        assert (answer.headers["x-swaplora-adapter"], answer.json()["model"]) == ("tuned@1", "tuned")


@pytest.mark.parametrize("adapter", ["tuned", ""])
def test_sagemakers_header_is_refused_where_nobody_reads_it(loaded: Running, adapter: str) -> None:
    """Or the base would answer."""
    headers = {ADAPTER_HEADER: adapter}
    for path, body in (("/v1/completions", BODY), ("/v1/chat/completions", CHAT)):
        error = loaded.client.post(path, json=body, headers=headers).json()["error"]
        assert (error["code"], error["param"]) == ("unsupported_field", ADAPTER_HEADER)
    assert loaded.client.get("/v1/models", headers=headers).status_code == 400


def test_sagemakers_ping_is_readiness(server: Running) -> None:
    assert server.client.get("/ping").status_code == 200
    server.service.is_draining = True
    try:
        assert server.client.get("/ping").status_code == 503
    finally:
        server.service.is_draining = False


@pytest.mark.parametrize("path", [*UNSERVED, "/v1/audio/speech", "/v1/chat/completions/some-id", "/v1/threads/x/runs"])
def test_a_route_of_openais_that_is_missing_is_told_as_that(server: Running, path: str) -> None:
    for method in ("GET", "POST"):
        answer = server.client.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        assert "is not served yet; POST /v1/chat/completions" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/chat/completions", "you may mean /v1/chat/completions"),
        ("/v1/v1/models", "you may mean /v1/models"),
        ("/v1/completions/", "you may mean /v1/completions"),
        ("/v1/audiobooks", "there is no route '/v1/audiobooks'; POST /v1/chat/completions"),
        ("/" + "x" * 5000, "GET /openapi.json"),
    ],
    ids=range(5),
)
def test_a_path_that_nobody_knows_is_told_what_there_is(server: Running, path: str, words: str) -> None:
    answer = server.client.post(path)
    assert answer.status_code == 404
    assert words in answer.json()["error"]["message"]
    assert len(answer.content) < 600


def test_a_method_that_is_not_served_is_told_which_is(server: Running) -> None:
    answer = server.client.get("/v1/chat/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["message"] == "GET is not served at '/v1/chat/completions'; POST is"


def test_a_root_path_can_hide_no_route(server: Running) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {path.split("/")[1] for path in [*paths, "/openapi.json", "/docs", "/ui"]} == set(ROUTES_BEGIN)
