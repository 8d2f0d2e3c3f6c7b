"""An adapter that is named as other servers have it answers as by its name in `model`, or the request is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import Running, serving, settings
from swaplora_server.http.foreign.names import id_of

BASE = "org/llama:8b"
PROMPT = list(range(30, 50))
USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def server(base: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(settings(base, tmp_path_factory.mktemp("data"), served_model_name=BASE)) as running:
        for name, folder in (("one", adapters[6]), ("two", adapters[7])):
            assert running.put(name, folder).status_code == 201
        assert running.client.put("/v1/aliases/prod", json={"target": "one"}).status_code == 200
        yield running


def refusal(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def complete(server: Running, prompt: object, **fields: Any) -> httpx.Response:
    body = {"model": BASE, "prompt": prompt, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    return server.client.post("/v1/completions", json=body | fields)


def ids(server: Running) -> dict[str, int]:
    return {one["path"]: one["id"] for one in server.client.get("/lora-adapters").json()}


ALONE = [
    {"lora_path": "one"},
    {"lora_path": ["one"]},
    {"lora_path": "one@1"},
    {"lora_path": "prod"},
    {"adapter_id": "one"},
    {"adapter_id": "one", "adapter_source": "local"},
    {"adapter_id": "one", "lora_path": "base:one", "adapters": [{"name": f"{BASE}:one"}]},
    {"lora": [{"id": id_of("one"), "scale": 1}]},
    {"lora": [{"id": id_of("two"), "scale": 0.0}, {"id": id_of("one"), "scale": 1.0}], "lora_path": "one"},
    {"model": "one", "lora_path": "one", "adapter_id": "one", "lora": [{"id": id_of("one"), "scale": 1}]},
    {"model": f"{BASE}:one"},
    {"model": f"{BASE}:prod", "adapter_id": "prod"},
    {"model": f"{BASE}:one@1"},
]


@pytest.mark.parametrize("fields", ALONE, ids=str)
def test_one_adapter_answers_by_each_of_its_names(server: Running, fields: dict[str, Any]) -> None:
    expected = server.token_ids("one", PROMPT)
    assert expected != server.token_ids(BASE, PROMPT)
    answer = complete(server, PROMPT, **fields)
    assert answer.json()["choices"][0]["token_ids"] == expected, answer.text
    assert answer.headers["x-swaplora-adapter"] == "one@1"
    assert answer.json()["model"] == fields.get("model", BASE)


def test_several_prompts_of_one_adapter(server: Running) -> None:
    prompts = [[5, 6], [7, 8], [9, 10]]
    answer = complete(server, prompts, lora_path=["two"] * 3)
    expected = [server.token_ids("two", prompt) for prompt in prompts]
    assert [choice["token_ids"] for choice in answer.json()["choices"]] == expected


def test_ids_with_scales_are_the_sum_of_the_deltas(server: Running) -> None:
    known = ids(server)
    lora = [{"id": known["two"], "scale": -0.5}, {"id": known["one"], "scale": 0.75}]
    named = [{"name": "two", "scale": -0.5}, {"name": "one", "scale": 0.75}]
    by_id, by_name = (server.generate(BASE, PROMPT, **fields) for fields in ({"lora": lora}, {"adapters": named}))
    assert by_id.json()["choices"] == by_name.json()["choices"]
    assert by_id.headers["x-swaplora-adapter"] == "two@1, one@1"


@pytest.mark.parametrize(
    "fields",
    [
        {"lora": []},
        {"lora": [{"id": id_of("one"), "scale": 0}, {"id": id_of("two"), "scale": -0.0}]},
        {"lora_path": None, "adapter_id": None, "adapter_source": None, "lora": None, "merged_adapters": None},
        {"lora_path": "", "adapter_id": ""},
        {"lora_path": [None]},
        {"parameters": {}, "lora_name": "", "adapter_names": [], "LoRA": None},
    ],
    ids=str,
)
def test_what_names_nobody_is_the_base(server: Running, fields: dict[str, Any]) -> None:
    answer = server.generate(BASE, PROMPT, **fields)
    assert answer.json()["choices"][0]["token_ids"] == server.token_ids(BASE, PROMPT), answer.text
    assert "x-swaplora-adapter" not in answer.headers


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "one", "lora_path": "two"}, "lora_path"),
        ({"model": "one", "adapter_id": "two"}, "adapter_id"),
        ({"model": "one", "adapter_id": "prod"}, "adapter_id"),
        ({"model": "one", "lora": [{"id": id_of("two"), "scale": 1}]}, "lora"),
        ({"model": "one", "lora": [{"id": id_of("one"), "scale": 0.5}]}, "lora"),
        ({"model": "one", "lora": [{"id": id_of("one"), "scale": 0}]}, "lora"),
        ({"lora_path": "one", "adapter_id": "two"}, "adapter_id"),
        ({"lora_path": "one", "lora": [{"id": id_of("two"), "scale": 1}]}, "lora"),
        ({"adapters": [{"name": "one", "scale": 0.5}], "lora_path": "one"}, "lora_path"),
        ({"adapters": [{"name": "one"}], "lora": [{"id": id_of("one"), "scale": 0}]}, "lora"),
        ({"lora_path": ["one", "one"]}, "lora_path"),
        ({"lora_path": []}, "lora_path"),
        ({"lora_path": {"a": "one"}}, "lora_path"),
        ({"lora_path": [1]}, "lora_path[0]"),
        ({"adapter_id": 1}, "adapter_id"),
        ({"adapter_id": ["one"]}, "adapter_id"),
        ({"lora": "one"}, "lora"),
        ({"lora": [{"id": id_of("one")}]}, "lora[0].scale"),
        ({"lora": [{"id": id_of("one"), "scale": True}]}, "lora[0].scale"),
        ({"lora": [{"id": id_of("one"), "scale": 1001}]}, "lora[0].scale"),
        ({"lora": [{"id": -1, "scale": 1}]}, "lora[0].id"),
        ({"lora": [{"id": id_of("one"), "scale": 1, "name": "two"}]}, "lora[0].name"),
        ({"lora": [{"id": id_of("one"), "scale": 1}] * 2}, "lora[1].id"),
        ({"lora_path": BASE}, "lora_path"),
    ],
    ids=str,
)
def test_names_that_do_not_go_together_are_refused(server: Running, fields: dict[str, Any], param: str) -> None:
    error = refusal(complete(server, PROMPT, **fields))
    assert (error["code"], error["param"]) == ("invalid_request", param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"lora_path": "nobody"}, "lora_path"),
        ({"lora_path": "/etc/passwd"}, "lora_path"),
        ({"adapter_id": "org/nobody"}, "adapter_id"),
        ({"lora": [{"id": 0, "scale": 1}]}, "lora[0].id"),
        ({"lora": [{"id": 0, "scale": 0}]}, "lora[0].id"),
        ({"model": f"{BASE}:nobody"}, "model"),
        ({"model": f"{BASE}:base:one"}, "model"),
        ({"model": f"{BASE}:{BASE}"}, "model"),
        ({"model": f"{BASE}:"}, "model"),
        ({"model": f"{BASE}_one"}, "model"),
    ],
    ids=str,
)
def test_who_is_not_there_is_told_by_the_field_that_names_it(
    server: Running, fields: dict[str, Any], param: str
) -> None:
    error = refusal(complete(server, PROMPT, **fields), 404)
    assert (error["code"], error["param"]) == ("model_not_found", param)


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter_id": "one", "adapter_source": "hub"},
        {"adapter_source": "s3"},
        {"merged_adapters": {"ids": ["one", "two"], "weights": [0.5, 0.5], "merge_strategy": "linear"}},
        {"merged_adapters": {"ids": ["one"], "merge_strategy": "ties", "density": 0.5}},
        {"parameters": {"adapter_id": "one"}},
        {"lora_request": {"lora_name": "one", "lora_int_id": 1}},
        {"lora_name": "one"},
        {"adapter_name": "one"},
        {"adapter": "one"},
        {"LoRAs": ["one"]},
    ],
    ids=str,
)
def test_what_would_be_left_unread_is_refused_on_every_route(server: Running, fields: dict[str, Any]) -> None:
    for path, body in ROUTES.items():
        answer = server.client.post(path, json={"model": BASE, **body, **fields})
        assert answer.status_code == 400, (path, answer.text)
        assert next(reversed(fields)) in answer.text


ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [USER], "max_tokens": 1},
    "/invocations": {"messages": [USER], "max_tokens": 1},
    "/v1/responses": {"input": "hi", "max_output_tokens": 1},
    "/v1/messages": {"messages": [USER], "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": [USER]},
    "/tokenize": {"messages": [USER]},
}


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_reads_every_name(server: Running, path: str) -> None:
    def post(**fields: Any) -> httpx.Response:
        return server.client.post(path, json={"model": BASE, **ROUTES[path], **fields})

    counts_only = path in ("/tokenize", "/v1/messages/count_tokens")
    names: list[dict[str, Any]] = [
        {"lora_path": "one"},
        {"adapter_id": "one"},
        {"lora": [{"id": id_of("one"), "scale": 1}]},
    ]
    for fields in names:
        answer = post(**fields)
        assert answer.status_code == 200, answer.text
        assert counts_only or answer.headers["x-swaplora-adapter"] == "one@1"
        assert post(**fields, model="two").status_code == 400
    names = [{"lora_path": "nobody"}, {"adapter_id": "nobody"}, {"adapters": [{"name": "nobody"}]}]
    for fields in names:
        assert post(**fields).status_code == 404


def test_prompts_of_different_adapters_are_requests_of_their_own(server: Running) -> None:
    for names in (["one", "two"], ["one", None], [None, "one"]):
        error = refusal(complete(server, [[5], [6]], lora_path=names))
        assert (error["code"], error["param"]) == ("unsupported_field", "lora_path")
        assert "a request for each" in error["message"]


def test_ids_are_an_adapters_own(server: Running, adapters: list[Path]) -> None:
    before = ids(server)
    assert before.keys() == {"one", "two"}
    lora = [{"id": before["one"], "scale": 1}]
    said = server.token_ids(BASE, PROMPT, lora=lora)
    assert server.put("a-new-one", adapters[5]).status_code == 201
    assert {name: number for name, number in ids(server).items() if name in before} == before
    assert server.token_ids(BASE, PROMPT, lora=lora) == said
    new = ids(server)["a-new-one"]
    assert new not in before.values()
    assert server.client.delete("/v1/adapters/a-new-one").status_code == 200
    assert server.put("another", adapters[4]).status_code == 201
    assert refusal(server.generate(BASE, PROMPT, lora=[{"id": new, "scale": 1}]), 404)["param"] == "lora[0].id"
    assert server.client.delete("/v1/adapters/another").status_code == 200


def test_two_adapters_of_one_id_have_none(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swaplora_server.http.foreign.names.id_of", lambda _name: 7)
    error = refusal(server.generate(BASE, PROMPT, lora=[{"id": 7, "scale": 1}]))
    assert "name one in model" in error["message"]


@given(st.text(max_size=128))
def test_an_id_is_a_number_of_every_language(name: str) -> None:
    assert 0 <= id_of(name.encode("utf-8", "replace").decode()) < 2**31


def test_scales_of_all_requests_stay_0(server: Running) -> None:
    listed = server.client.get("/lora-adapters").json()
    assert [(one["path"], one["scale"]) for one in listed] == [("one", 0.0), ("two", 0.0)]
    for taken in ([], [{"id": one["id"], "scale": 0} for one in listed]):
        answer = server.client.post("/lora-adapters", json=taken)
        assert (answer.status_code, answer.json()) == (200, {"success": True})
    for body, status, param in (
        ([{"id": listed[0]["id"], "scale": 0}, {"id": listed[1]["id"], "scale": 0.5}], 400, "[1].scale"),
        ([{"id": 0, "scale": 0}], 404, "[0].id"),
        ([{"id": listed[0]["id"]}], 400, "[0].scale"),
        ({"id": 0, "scale": 1}, 400, None),
    ):
        assert refusal(server.client.post("/lora-adapters", json=body), status)["param"] == param
    assert "x-swaplora-adapter" not in server.generate(BASE, PROMPT).headers


def test_sagemakers_header_goes_with_other_names_or_is_refused(server: Running) -> None:
    def invoke(headers: dict[str, str], **fields: Any) -> httpx.Response:
        body = {"model": BASE, "prompt": PROMPT, "max_tokens": 1}
        return server.client.post("/invocations", json=body | fields, headers=headers)

    named = {"X-Amzn-SageMaker-Adapter-Identifier": "one"}
    assert invoke(named, lora_path="one").headers["x-swaplora-adapter"] == "one@1"
    assert refusal(invoke(named, lora_path="two"))["param"] == "lora_path"
    assert refusal(invoke(named, model="two"))["param"] == "model"
    session = invoke({"X-Amzn-SageMaker-Session-Id": "a"})
    assert refusal(session)["param"] == "X-Amzn-SageMaker-Session-Id"
    opened = server.client.post("/invocations", json={"requestType": "NEW_SESSION"})
    assert "no session is kept" in refusal(opened)["message"]


def test_a_model_is_shown_by_the_bases_id_and_its_name(server: Running) -> None:
    for model in (f"{BASE}:one", f"{BASE}:prod"):
        shown = server.client.get(f"/v1/models/{model}").json()
        assert (shown["id"], shown["parent"]) == (model, BASE)
    assert server.client.get(f"/v1/models/{BASE}:nobody").status_code == 404
