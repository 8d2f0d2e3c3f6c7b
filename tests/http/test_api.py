"""The HTTP contract: shapes, streams, refusals by name, and no input that makes the server fail."""

import json
import re
import socket
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

import tiny
from serving import BASE, Running, Streamed, read_event, serving, settings

PROMPT = list(range(30, 50))


@pytest.fixture(scope="module")
def loaded(server: Running, adapters: list[Path]) -> Running:
    server.put("tuned", adapters[4])
    return server


def complete(server: Running, **fields: Any) -> httpx.Response:
    return server.client.post("/v1/completions", json={"model": BASE, "prompt": PROMPT, "max_tokens": 3} | fields)


def chat(server: Running, **fields: Any) -> httpx.Response:
    body = {"model": BASE, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    return server.client.post("/v1/chat/completions", json=body | fields)


def test_the_list_of_models_is_what_can_be_called(loaded: Running) -> None:
    models = loaded.client.get("/v1/models").json()["data"]
    assert [(model["id"], model["parent"]) for model in models] == [(BASE, None), ("tuned", BASE)]
    for model in models:
        assert complete(loaded, model=model["id"]).status_code == 200
        assert loaded.client.get(f"/v1/models/{model['id']}").json() == model
    assert models[1]["root"].startswith("sha256:")


def fingerprints(server: Running, **fields: Any) -> set[str]:
    """Of both routes, whole and in every chunk."""
    found = set()
    for post in (complete, chat):
        found.add(post(server, **fields).json()["system_fingerprint"])
        found |= {json.loads(said)["system_fingerprint"] for said in events(post(server, **fields, stream=True))[:-1]}
    return found


def test_a_fingerprint_is_anothers_wherever_an_answer_may_be(
    loaded: Running, base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    (ours,), (tuned,) = fingerprints(loaded), fingerprints(loaded, model="tuned")
    terms = [{"name": "tuned", "scale": 0.5}]
    assert ours != tuned
    assert fingerprints(loaded, adapters=terms, model=BASE) == {tuned}  # the scale is the request's own
    assert complete(loaded, seed=5, temperature=0, max_tokens=1).json()["system_fingerprint"] == ours
    others: list[str] = []
    changes: list[dict[str, Any]] = [{}, {"max_batch_tokens": 64}, {"max_model_len": 64, "log_level": "error"}]
    for number, fields in enumerate(changes):
        with serving(settings(base, tmp_path / str(number), **fields)) as other:
            others += fingerprints(other)
            if not fields:
                other.put("tuned", adapters[4])
                assert fingerprints(other, model="tuned") == {tuned}
                other.put("tuned", adapters[3])
                assert fingerprints(other, model="tuned").isdisjoint({tuned, ours})
    assert others[0] == ours
    assert len({*others, tuned}) == 4
    assert all(re.fullmatch("fp_[0-9a-f]{16}", one) for one in others)


@pytest.mark.parametrize("model", ["tuned", "tuned@1", "base:tuned"])
def test_every_spelling_of_an_adapter_is_answered_by_it(loaded: Running, model: str) -> None:
    answer = complete(loaded, model=model)
    assert answer.headers["x-swaplora-adapter"] == "tuned@1"
    assert answer.json()["model"] == model


@pytest.mark.parametrize("model", ["nobody", "Tuned", "tune", "tuned@sha256:000000000000", "base@1", "BASE"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("is_streaming", [True, False])
def test_an_unknown_model_is_not_found_and_nothing_is_generated(
    loaded: Running, model: str, path: str, is_streaming: bool
) -> None:
    body = {"model": model, "prompt": "x", "messages": [{"role": "user", "content": "x"}], "stream": is_streaming}
    answer = loaded.client.post(path, json=body)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] in ("model_not_found", "version_not_found")
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("prompt", "num_choices"), [("hello", 1), (["a", "bc"], 2), ([1, 2, 3], 1), ([[1, 2], [3], [4, 5]], 3)]
)
def test_prompts_in_all_four_forms(loaded: Running, prompt: Any, num_choices: int) -> None:
    answer = complete(loaded, prompt=prompt, n=2).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * num_choices))
    assert answer["usage"]["completion_tokens"] <= 2 * num_choices * 3


def test_a_prompt_of_text_and_of_its_ids_are_the_same(loaded: Running) -> None:
    ids = tiny.byte_tokenizer().encode("hello", add_special_tokens=False)
    texts = [complete(loaded, prompt=prompt, temperature=0).json()["choices"][0]["text"] for prompt in ("hello", ids)]
    assert texts[0] == texts[1]


def events(response: httpx.Response) -> list[str]:
    assert response.headers["content-type"].startswith("text/event-stream")
    return [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]


def test_a_chat_stream_comes_in_the_order_that_clients_expect(loaded: Running) -> None:
    raw = events(chat(loaded, stream=True, stream_options={"include_usage": True}, ignore_eos=True))
    assert raw[-1] == "[DONE]"
    chunks = [json.loads(data) for data in raw[:-1]]
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * 4 + ["length"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"stop": ["e", "a"]}, {"temperature": 1, "seed": 5, "top_p": 0.9}])
def test_a_stream_says_what_the_whole_answer_says(loaded: Running, fields: dict[str, Any]) -> None:
    body = {"model": "tuned", "max_tokens": 30, "temperature": 0, "seed": 1} | fields
    whole = complete(loaded, **body).json()
    parts: dict[int, Streamed] = {}
    for data in events(complete(loaded, **body, stream=True))[:-1]:
        index = json.loads(data)["choices"][0]["index"]
        read_event(parts.setdefault(index, Streamed({})), data)
    for choice in whole["choices"]:
        said = parts[choice["index"]]
        assert (said.text, said.finish_reason) == (choice["text"], choice["finish_reason"])


def test_a_seed_repeats_and_its_continuations_differ(loaded: Running) -> None:
    texts = [
        [choice["text"] for choice in complete(loaded, n=3, seed=7, max_tokens=20).json()["choices"]] for _ in range(2)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


def test_stop_token_ids_and_ignore_eos(loaded: Running) -> None:
    whole = complete(loaded, max_tokens=20, temperature=0, return_token_ids=True, ignore_eos=True).json()["choices"][0]
    stop = whole["token_ids"][4]
    choice = complete(
        loaded, max_tokens=20, temperature=0, return_token_ids=True, ignore_eos=True, stop_token_ids=[stop]
    ).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["token_ids"] == whole["token_ids"][: whole["token_ids"].index(stop) + 1]


def test_logprobs_of_a_chat(loaded: Running) -> None:
    content = chat(loaded, logprobs=True, top_logprobs=2, temperature=0, ignore_eos=True).json()["choices"][0]
    for token in content["logprobs"]["content"]:
        assert token["logprob"] == token["top_logprobs"][0]["logprob"] >= token["top_logprobs"][1]["logprob"]
        assert bytes(token["bytes"]).decode(errors="backslashreplace") == token["token"]


REFUSED_ANYWHERE: dict[str, Any] = {
    "length_penalty": 0.5,
    "typical_p": 0.5,
    "mirostat": 2,
    "bad_words": ["bad"],
    "use_beam_search": True,
}


@pytest.mark.parametrize("field", REFUSED_ANYWHERE)
def test_a_field_that_is_not_honoured_is_refused_by_name(loaded: Running, field: str) -> None:
    for post in (complete, chat):
        answer = post(loaded, **{field: REFUSED_ANYWHERE[field]})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "unsupported_field", field)
        assert field in error["message"]
        assert post(loaded, **{field: None}).status_code == 200


@pytest.mark.parametrize(
    ("post", "field", "value"),
    [
        (complete, "suffix", "x"),
        (chat, "echo", True),
        (chat, "best_of", 2),
        (chat, "tool_choice", "required"),
        (chat, "audio", {"voice": "v"}),
        (chat, "reasoning_effort", "high"),
        (chat, "chat_template", "{{ messages }}"),
    ],
)
def test_fields_of_one_route_are_refused_there(loaded: Running, post: Any, field: str, value: Any) -> None:
    assert post(loaded, **{field: value}).json()["error"]["param"] == field


@pytest.mark.parametrize("raw", [b"[" + b"-1," * 300_000 + b"-1]", b"[" + b'"a",' * 300_000 + b"1]"])
def test_a_long_list_of_bad_items_costs_no_more_than_a_good_one(loaded: Running, raw: bytes) -> None:
    answer = loaded.client.post("/v1/completions", content=b'{"model":"base","prompt":' + raw + b"}", timeout=5)
    assert answer.status_code == 400
    assert len(answer.content) < 2000


def test_a_body_of_nothing_but_unknown_fields_is_refused(loaded: Running) -> None:
    assert complete(loaded, **{f"x{n}": n for n in range(100)}).status_code == 400


def test_null_stands_for_the_default(loaded: Running) -> None:
    names = ["n", "temperature", "top_p", "seed", "stop", "stream", "logprobs", "user", "skip_special_tokens"]
    assert chat(loaded, **dict.fromkeys([*names, "add_generation_prompt", "return_token_ids"])).status_code == 200


def test_a_temperature_too_small_to_divide_by_is_greedy(loaded: Running) -> None:
    texts = {complete(loaded, temperature=t, max_tokens=9).json()["choices"][0]["text"] for t in (0, 1e-46, 1e-9)}
    assert len(texts) == 1


def test_min_tokens_holds_a_stop_token_back(loaded: Running) -> None:
    fields = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    whole = complete(loaded, **fields).json()["choices"][0]["token_ids"]
    held = complete(loaded, **fields, stop_token_ids=[whole[1]], min_tokens=6).json()["choices"][0]["token_ids"]
    assert len(held) > 6
    assert whole[1] not in held[:6]


def test_a_bias_and_allowed_tokens_decide_what_is_said(loaded: Running) -> None:
    fields = {"max_tokens": 4, "return_token_ids": True, "ignore_eos": True}
    for post in (complete, chat):
        biased = post(loaded, **fields, temperature=0, logit_bias={"65": 100, "66": 99.5}).json()["choices"][0]
        assert biased["token_ids"] == [65] * 4
        allowed = post(loaded, **fields, n=8, allowed_token_ids=[66, 67]).json()["choices"]
        assert {token for choice in allowed for token in choice["token_ids"]} == {66, 67}


def test_penalties_keep_tokens_from_coming_again(loaded: Running) -> None:
    fields = {"max_tokens": 6, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
    few = {"allowed_token_ids": [65, 66, 67], "logit_bias": {"65": 100, "66": 99, "67": 98}}

    def said(**penalties: float) -> list[int]:
        answer = complete(loaded, **fields, **few, **penalties)
        ids: list[int] = answer.json()["choices"][0]["token_ids"]
        return ids

    assert said() == said(presence_penalty=0, frequency_penalty=0, repetition_penalty=1) == [65] * 6
    assert len(set(said(frequency_penalty=2))) > 1
    assert said(presence_penalty=-2, frequency_penalty=-2) == [65] * 6
    assert len(set(said(repetition_penalty=2)[:3])) == 3


def test_what_would_forbid_every_token_is_refused(loaded: Running) -> None:
    error = complete(loaded, allowed_token_ids=[tiny.EOS], min_tokens=1).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_request", "allowed_token_ids")
    assert complete(loaded, allowed_token_ids=[tiny.EOS]).json()["choices"][0]["finish_reason"] == "stop"
    assert complete(loaded, allowed_token_ids=[tiny.EOS], min_tokens=1, ignore_eos=True).status_code == 200


def test_a_field_that_nobody_defines_is_ignored(loaded: Running) -> None:
    assert complete(loaded, colour="blue").status_code == 200


NO_BIASES: list[Any] = [-101, 100.5, "1", None, True, {}]
NOT_IDS: list[Any] = [[], [-1], [259], [1.5], ["5"], 5, {"5": 1}, [2**31]]
INVALID: list[dict[str, Any]] = [
    {"model": None},
    {"model": ""},
    {"model": 5},
    {"prompt": []},
    {"prompt": [[]]},
    {"prompt": ""},
    {"prompt": [1.5]},
    {"prompt": [-1]},
    {"prompt": [259]},
    {"prompt": [2**63]},
    {"prompt": [True]},
    {"prompt": ["a", 1]},
    {"prompt": ["a"] * 2049},
    {"prompt": {"a": 1}},
    {"max_tokens": 0},
    {"max_tokens": -1},
    {"max_tokens": "5"},
    {"max_tokens": True},
    {"max_tokens": 1.5},
    {"max_tokens": 2**63},
    {"n": 0},
    {"n": 129},
    {"n": 2**31},
    {"n": True},
    {"temperature": -0.1},
    {"temperature": "hot"},
    {"temperature": 1e400},
    {"top_p": 0},
    {"top_p": 1.1},
    {"top_k": -2},
    {"min_p": 2},
    *({name: value} for name in ("presence_penalty", "frequency_penalty") for value in (-2.1, 2.01, "1", True, 1e400)),
    *({"repetition_penalty": value} for value in (0, -1, 1e-9, 101, "1", True)),
    *({"logit_bias": {"5": value}} for value in NO_BIASES),
    *({"logit_bias": {name: 1}} for name in ("", "a", "-1", "1.5", "259", "9" * 10, "9" * 5000, "\u0665", "1_0")),
    {"logit_bias": {str(n): 1 for n in range(1025)}},
    {"logit_bias": [5]},
    {"logit_bias": "5"},
    *({"allowed_token_ids": value} for value in NOT_IDS),
    {"min_tokens": -1},
    {"min_tokens": 4},
    {"min_tokens": 2**40},
    {"seed": -(2**63) - 1},
    {"seed": 2**63},
    {"stop": ["a"] * 129},
    {"stop": ""},
    {"stop": [""]},
    {"stop": [1]},
    {"stop_token_ids": [-1]},
    {"stop_token_ids": list(range(129))},
    {"stream": "yes"},
    {"stream_options": 1},
]


@pytest.mark.parametrize("fields", INVALID, ids=lambda fields: str(fields)[:40])
def test_a_value_that_makes_no_sense_is_a_400_that_names_it(loaded: Running, fields: dict[str, Any]) -> None:
    raw = json.dumps({"model": BASE, "prompt": PROMPT, "max_tokens": 3, "stream": True} | fields)
    answer = loaded.client.post("/v1/completions", content=raw)
    assert answer.status_code in (400, 404)
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert next(iter(fields)) in f"{error['param']} {error['message']}"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model": NaN}',
        b'{"model":' + b"[" * 10_000,
        b'{"model":"\\ud800","prompt":"x"}',
        b'{"model":"base","prompt":"\\ud800"}',
        b'{"model":"base","model":"x","prompt":1e400}',
    ],
    ids=range(10),
)
def test_a_body_that_is_not_what_it_should_be_is_a_400(loaded: Running, raw: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert loaded.client.post(path, content=raw).status_code == 400


def test_a_body_beyond_the_limit_is_refused(base: Path, tmp_path: Path) -> None:
    with serving(settings(base, tmp_path, max_body_bytes=1000)) as small:
        answer = complete(small, prompt="x" * 1001)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert complete(small).status_code == 200


def test_a_context_that_does_not_fit_is_refused_before_it_runs(loaded: Running) -> None:
    for fields in ({"prompt": [5] * 512}, {"max_tokens": 500}):
        error = complete(loaded, **fields).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["message"].startswith("This model's maximum context length is 512 tokens")
    assert complete(loaded, prompt=[5] * 509, max_tokens=3).status_code == 200


def test_messages_that_are_not_text_are_refused(loaded: Running) -> None:
    for message in (
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user"},
        {"content": "x"},
        {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]},
    ):
        assert chat(loaded, messages=[message]).status_code == 400
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    answers = [chat(loaded, messages=[{"role": "user", "content": c}], temperature=0).json() for c in ("hi", parts)]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_a_template_cannot_be_brought_along(loaded: Running) -> None:
    for name in ("chat_template", "tokenize", "tools", "conversation"):
        answer = chat(loaded, chat_template_kwargs={name: "{{ 7 * 7 }}"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "chat_template_kwargs")
    assert chat(loaded, chat_template_kwargs={"enable_thinking": False}).status_code == 200


def test_request_ids_are_echoed_when_plain_and_made_otherwise(loaded: Running) -> None:
    for path in ("/health", "/v1/models", "/nowhere"):
        assert loaded.client.get(path, headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
        forged = loaded.client.get(path, headers={"X-Request-Id": "a b\tforged"}).headers["x-request-id"]
        assert len(forged) == 32


def test_unknown_routes_and_methods_have_the_same_error_body(loaded: Running) -> None:
    for method, path, status in [("GET", "/v2", 404), ("DELETE", "/v1/models", 405), ("GET", "/v1/completions", 405)]:
        answer = loaded.client.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_full_queue_is_told_at_once(base: Path, tmp_path: Path) -> None:
    with serving(settings(base, tmp_path, max_waiting=0, max_num_seqs=2)) as small:
        answer = complete(small, n=3)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
        admission = small.service.admissions.admit(2)  # as of a request that goes on for longer than this test takes
        answer = complete(small)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
        assert answer.headers["retry-after"] == "1"
        admission.release()
        assert complete(small, n=2).status_code == 200


def test_a_head_without_end_is_refused_before_it_has_arrived(loaded: Running) -> None:
    host, port = loaded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: ")
        with suppress(ConnectionError):  # the server hangs up while we still send
            for _ in range(1024):
                connection.sendall(b"a" * (64 << 10))
        with suppress(ConnectionError):
            assert connection.recv(100).startswith(b"HTTP/1.1 431")
    assert loaded.client.get("/health", headers={"X-Long": "a" * 60_000}).status_code == 200


def test_what_is_no_http_is_told_in_the_one_error_body(loaded: Running) -> None:
    host, port = loaded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        head, _, body = connection.recv(4096).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["code"] == "invalid_request"


def test_every_route_but_the_public_ones_wants_the_key(base: Path, tmp_path: Path) -> None:
    with serving(settings(base, tmp_path, api_key=("correct",))) as locked:
        keyed = {"Authorization": "Bearer correct"}
        assert locked.client.get("/openapi.json").status_code == 401
        paths = locked.client.get("/openapi.json", headers=keyed).json()["paths"]
        assert len(paths) >= 17
        for path, methods in paths.items():
            for method in methods:
                url = path.format(name="x", model="x", alias="x", key_id="x", evaluation_id="x")
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "correct"}):
                    answer = locked.client.request(method, url, headers=headers)
                    is_public = path in ("/health", "/health/ready", "/version", "/ping")
                    assert answer.status_code == (200 if is_public else 401), (method, path)
        assert locked.client.get("/v1/models", headers=keyed).status_code == 200


def test_a_defect_is_answered_under_its_request_id_and_says_nothing_else(
    loaded: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_name: str) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(loaded.service.registry, "card", broken)
    # captured, since structlog's default, unlike the server's, shows every local variable and holds up the event loop
    with capture_logs(processors=[merge_contextvars]) as logs:
        answer = loaded.client.get("/v1/adapters/tuned", headers={"X-Request-Id": "trace-me"})
        loaded.client.get("/health")  # answered once the one before is logged
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert answer.headers["x-request-id"] == "trace-me"
    assert "secret" not in answer.text
    assert [(log["request_id"], log["path"]) for log in logs if log["log_level"] == "error"] == [
        ("trace-me", "/v1/adapters/tuned")
    ]


def test_health_ready_and_version(loaded: Running) -> None:
    assert loaded.client.get("/health").json() == {"status": "ok"}
    assert loaded.client.get("/health/ready").json() == {"ready": True}
    told = loaded.client.get("/version").json()
    kernels = loaded.service.base.backend.description
    assert told == {"version": version("swaplora"), "device": "cpu", "dtype": "float32", "kernels": kernels}
    loaded.service.is_draining = True
    try:
        assert loaded.client.get("/health/ready").status_code == 503
        assert complete(loaded).json()["error"]["code"] == "draining"
    finally:
        loaded.service.is_draining = False


def test_openais_own_client_works(loaded: Running) -> None:
    with openai.OpenAI(base_url=f"{loaded.url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == [BASE, "tuned"]
        answer = client.chat.completions.create(
            model="tuned", messages=[{"role": "user", "content": "hi"}], max_tokens=5, temperature=0
        )
        stream = client.chat.completions.create(
            model="tuned", messages=[{"role": "user", "content": "hi"}], max_tokens=5, temperature=0, stream=True
        )
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert streamed == answer.choices[0].message.content
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="nobody", prompt="x")
