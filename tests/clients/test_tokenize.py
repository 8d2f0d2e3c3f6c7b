"""Texts as token ids and back: as vLLM's clients ask for it, and as prompts are made."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from serving import BASE, Running
from swaplora_server.service import service as service_module

TOKENIZER = tiny.byte_tokenizer()
MESSAGES = [{"role": "user", "content": "hi"}]


def ask(server: Running, route: str = "/tokenize", **fields: Any) -> dict[str, Any]:
    answer = server.client.post(route, json=fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("has_special", [True, False, None])
def test_a_text_is_what_a_completion_would_be_given(server: Running, has_special: bool | None) -> None:
    told = ask(server, model=BASE, prompt="aß<|eos|>", add_special_tokens=has_special)
    expected = TOKENIZER.encode("aß<|eos|>", add_special_tokens=has_special is not False)
    length = server.service.max_model_len
    assert told == {"count": len(expected), "max_model_len": length, "tokens": expected, "token_strs": None}


def test_a_conversation_is_what_a_chat_would_be_given(server: Running) -> None:
    asked: dict[str, Any] = {"model": BASE, "messages": MESSAGES}
    chat = asked | {"max_tokens": 1, "return_token_ids": True}
    of_chat = server.client.post("/v1/chat/completions", json=chat).json()["choices"][0]["prompt_token_ids"]
    assert ask(server, **asked)["tokens"] == of_chat
    assert ask(server, messages=MESSAGES, add_generation_prompt=False)["count"] < len(of_chat)


def test_pieces_are_given_where_they_are_asked_for(server: Running) -> None:
    told = ask(server, prompt="aß ", return_token_strs=True)
    assert told["token_strs"] == TOKENIZER.convert_ids_to_tokens(told["tokens"]) == ["a", "Ã", "Ł", "Ġ"]


@settings(max_examples=20)
@given(text=st.text(max_size=30))
def test_a_text_comes_back(server: Running, text: str) -> None:
    tokens = ask(server, prompt=text.encode(errors="ignore").decode(), add_special_tokens=False)["tokens"]
    assert ask(server, "/detokenize", tokens=tokens) == {"prompt": text.encode(errors="ignore").decode()}


def test_ids_are_written_as_the_tokenizer_writes_them(server: Running) -> None:
    for tokens in ([tiny.BOS, 40, 41, tiny.EOS], [40, 195], []):
        assert ask(server, "/detokenize", model=BASE, tokens=tokens)["prompt"] == TOKENIZER.decode(tokens)


def test_a_harness_finds_the_tokenizer_that_it_may_ask(server: Running) -> None:
    told = server.client.get("/tokenizer_info").json()
    assert (told["eos_token"], told["bos_token"], told["pad_token"]) == ("<|eos|>", "<|bos|>", "<|pad|>")
    assert told["chat_template"] == tiny.CHAT_TEMPLATE
    assert ask(server, prompt=told["eos_token"], add_special_tokens=False)["tokens"] == [tiny.EOS]


def test_what_is_long_is_done_beside_the_event_loop(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    offload = server.service.offload
    do = offload.do

    async def noted(size: int, job: Callable[[], Any]) -> Any:
        done.append(size)
        return await do(size, job)

    monkeypatch.setattr(offload, "do", noted)
    monkeypatch.setattr(service_module, "LONG_CHARACTERS", 9)
    assert ask(server, "/detokenize", tokens=[40] * 10)["prompt"] == TOKENIZER.decode([40] * 10)
    assert done == [10]
    assert ask(server, prompt="x" * 10, return_token_strs=True)["token_strs"] == ["x"] * 10
    assert done == [10, 10]


def test_any_name_that_answers_may_be_given_and_no_other(server: Running, adapters: list[Any]) -> None:
    server.put("tuned", adapters[0])
    for model in (BASE, "tuned", "tuned@1", "base:tuned", None):
        assert ask(server, model=model, prompt="x")["count"] == 1
    for route, fields in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        answer = server.client.post(route, json={"model": "nobody"} | fields)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("/tokenize", {}, None),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, None),
        ("/tokenize", {"prompt": ["x"]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "x" * 100_000}, "prompt"),
        ("/tokenize", {"prompt": "x", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "{{ 1 }}"}, "chat_template"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [259]}, "tokens"),
        ("/detokenize", {"tokens": [2**40]}, "tokens[0]"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_field(
    server: Running, route: str, fields: dict[str, Any], param: str | None
) -> None:
    answer = server.client.post(route, json=fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
