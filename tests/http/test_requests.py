"""What clients in the field send: values that ask for nothing are taken, what is refused is named all at once."""

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import chat_completion_message_param
from openai.types.chat import completion_create_params as chat_create_params

import refused_list
import tiny
from serving import BASE, Running, serving, settings
from swaplora_server.engine.request import FinishReason, Request, TokenEvent
from swaplora_server.http.refusals import CHAT, COMPLETION, MESSAGE
from swaplora_server.http.transport.body import field_path
from swaplora_server.http.wire import ChatBody, CompletionBody, Message

PROMPT = list(range(30, 50))
USER = {"role": "user", "content": "hi"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
# of OpenAI's fields those that ask for nothing that the answer would show
TAGS = {
    *("metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
    "prediction",
}


def complete(server: Running, **fields: Any) -> httpx.Response:
    return server.client.post("/v1/completions", json={"model": BASE, "prompt": PROMPT, "max_tokens": 2} | fields)


def chat(server: Running, **fields: Any) -> httpx.Response:
    body = {"model": BASE, "messages": [USER], "max_tokens": 2}
    return server.client.post("/v1/chat/completions", json=body | fields)


def refusal(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


NEUTRAL: list[dict[str, Any]] = [
    {"seed": -1},
    {"seed": -7},
    {"seed": 2**63 - 1},
    {"seed": None},
    {"top_k": -1},
    {"top_k": 0},
    {"n": 32, "temperature": 1},
    {"n": 128, "max_tokens": 1},
    {"n": None},
    {"n": 2, "best_of": 2},
    {"best_of": 1},
    {"max_tokens": 2.0},
    {"stop": [f"\n{name}:" for name in "abcdefghijklmnopqrstu"]},
    {"stop": [f"{number:64}" for number in range(128)]},
    {"stop": []},
    {"stop_token_ids": list(range(128, 256))},
    {"add_special_tokens": True},
    {"add_special_tokens": False},
    {"frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "length_penalty": 1},
    {"logit_bias": {}},
    {"frequency_penalty": None, "presence_penalty": None, "repetition_penalty": None, "logit_bias": None},
    {"allowed_token_ids": None},
    {"frequency_penalty": -2, "presence_penalty": 2, "repetition_penalty": 1.3, "logit_bias": {"5": -100, "6": 100.0}},
    {"allowed_token_ids": list(range(259)), "min_tokens": 2},
    {"echo": False},
    {"response_format": {"type": "text"}},
    {"use_beam_search": False, "detokenize": True, "skip_special_tokens": True, "spaces_between_special_tokens": True},
    {"store": False, "metadata": {"a": "b"}, "service_tier": "auto", "user": "me"},
    {"store": True, "prediction": {"type": "content", "content": "hi"}, "prompt_cache_retention": "24h"},
    {"service_tier": "default", "prompt_cache_key": "k", "safety_identifier": "s"},
    {"stream": None, "stream_options": None, "temperature": None, "truncate_prompt_tokens": None},
    {"prompt_logprobs": None, "structured_outputs": None, "guided_json": None},
]
NEUTRAL_IN_A_CHAT: list[dict[str, Any]] = [
    {"logprobs": False, "top_logprobs": 0},
    {"logprobs": None, "top_logprobs": None},
    {"tools": [], "tool_choice": "none"},
    {"tool_choice": "auto", "parallel_tool_calls": True},
    {"functions": [], "function_call": "none"},
    {"modalities": ["text"], "verbosity": "medium", "reasoning_effort": None},
    {"messages": [{**USER, "tool_calls": [], "refusal": None, "name": None}]},
    {"messages": [{"role": "user", "content": []}]},
]


@pytest.mark.parametrize("fields", NEUTRAL, ids=lambda fields: str(fields)[:60])
def test_a_value_that_asks_for_nothing_is_taken(server: Running, fields: dict[str, Any]) -> None:
    for post in (complete, chat):
        answer = post(server, **fields)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("fields", NEUTRAL_IN_A_CHAT, ids=lambda fields: str(fields)[:60])
def test_a_value_that_asks_for_nothing_is_taken_in_a_chat(server: Running, fields: dict[str, Any]) -> None:
    answer = chat(server, **fields)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("fields", [{"suffix": ""}, {"suffix": None}, {"logprobs": None}, {"prompt": ["a"] * 100}])
def test_a_value_that_asks_for_nothing_is_taken_in_a_completion(server: Running, fields: dict[str, Any]) -> None:
    assert complete(server, **fields).status_code == 200


@pytest.mark.parametrize("fields", [{"suffix": "x", "best_of": 3}, {"store": "yes"}, {"service_tier": "free"}])
def test_a_value_that_asks_for_something_is_refused(server: Running, fields: dict[str, Any]) -> None:
    error = refusal(complete(server, **fields))
    assert (error["code"], error["param"]) == ("unsupported_field", next(iter(fields)))


@pytest.mark.parametrize("tier", ["auto", "default", "flex", "scale", "priority"])
def test_who_asks_for_a_tier_is_told_which_it_was(server: Running, tier: str) -> None:
    for post in (complete, chat):
        assert post(server, service_tier=tier).json()["service_tier"] == "default"
        assert '"service_tier":"default"' in post(server, service_tier=tier, stream=True).text
        assert "service_tier" not in post(server).json()
    answer = server.client.post("/v1/responses", json={"model": BASE, "input": "hi", "service_tier": tier})
    assert answer.json()["service_tier"] == "default"


def test_who_looks_for_a_stored_answer_is_told_that_there_is_none(server: Running) -> None:
    stored = chat(server, store=True).json()["id"]
    missing = server.client.get(f"/v1/chat/completions/{stored}")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert "not served yet" in missing.json()["error"]["message"]


def test_a_seed_of_minus_one_is_none(server: Running) -> None:
    texts = {complete(server, seed=-1, max_tokens=20, ignore_eos=True).text.partition("choices")[2] for _ in range(3)}
    assert len(texts) == 3
    texts = {complete(server, seed=-2, max_tokens=20, ignore_eos=True).text.partition("choices")[2] for _ in range(3)}
    assert len(texts) == 1


def test_more_sequences_than_a_server_takes_is_told_with_its_settings(base: Path, tmp_path: Path) -> None:
    with serving(settings(base, tmp_path, max_waiting=3, max_num_seqs=2)) as small:
        cases: list[tuple[dict[str, Any], str]] = [
            ({"n": 6}, "n"),
            ({"prompt": ["a"] * 6}, "prompt"),
            ({"prompt": ["a", "b"], "n": 3}, "n"),
        ]
        for fields, param in cases:
            error = refusal(complete(small, **fields))
            assert (error["code"], error["param"]) == ("invalid_request", param)
            assert "at most 5" in error["message"]
            assert "--max-num-seqs" in error["message"]
        assert complete(small, prompt=["a"] * 5).status_code == 200


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose tokenizer puts a token of its own before a text."""
    folder = tiny.save_tiny_base(tmp_path_factory.mktemp("base"))
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()
    tokenizer.save_pretrained(folder)
    with serving(settings(folder, tmp_path_factory.mktemp("data"))) as running:
        yield running


@pytest.mark.parametrize(
    ("given", "is_added"), [({}, True), ({"add_special_tokens": True}, True), ({"add_special_tokens": False}, False)]
)
def test_special_tokens_are_added_to_a_text_unless_they_are_not_wanted(
    beginning: Running, given: dict[str, bool], is_added: bool
) -> None:
    ids = complete(beginning, prompt="hi", return_token_ids=True, **given).json()["choices"][0]["prompt_token_ids"]
    assert ids == [
        *([tiny.BOS] if is_added else []),
        *beginning.service.base.tokenizer.encode("hi", add_special_tokens=False),
    ]


@pytest.mark.parametrize(
    ("given", "is_added"), [({}, False), ({"add_special_tokens": True}, True), ({"add_special_tokens": False}, False)]
)
def test_special_tokens_are_added_to_a_conversation_if_they_are_wanted(
    beginning: Running, given: dict[str, bool], is_added: bool
) -> None:
    ids = chat(beginning, return_token_ids=True, **given).json()["choices"][0]["prompt_token_ids"]
    text = beginning.service.base.tokenizer.encode("<user>hi\n<assistant>", add_special_tokens=False)
    assert ids == [*([tiny.BOS] if is_added else []), *text]


def test_all_that_is_refused_is_named_at_once_with_what_to_do(server: Running) -> None:
    spoken = {"role": "assistant", "content": "x", "audio": {"id": "a"}}
    refused = {"role": "assistant", "content": "y", "refusal": "z"}
    messages = [USER, spoken, refused, spoken, refused]
    error = refusal(chat(server, messages=messages, mirostat=2, modalities=["audio"], bad_words=["b"], colour=1))
    assert (error["code"], error["param"]) == ("unsupported_field", "mirostat")
    complaints = error["message"].split(". ")
    assert [complaint.split(" is not supported yet: ")[0] for complaint in complaints] == [
        "mirostat",
        "modalities",
        "bad_words",
        "messages[1].audio",
        "messages[2].refusal",
    ]
    assert complaints[0].endswith("leave it out or send 0")
    assert all("leave it out" in complaint for complaint in complaints)


@pytest.mark.parametrize("content", [{"content": None}, {}])
def test_nothing_beside_a_tool_call_is_not_what_is_wrong(server: Running, content: dict[str, None]) -> None:
    call = {"role": "assistant", "tool_calls": [CALL], **content}
    assert chat(server, messages=[USER, call]).status_code == 200
    assert refusal(chat(server, messages=[USER, {"role": "assistant", **content}]))["param"] == "messages[1].content"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [USER, {"role": "user", "content": [{"type": "text"}]}]}, "messages[1].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": []}, "messages"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["a", 1]}, "stop[1]"),
        ({"stop": {}}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"adapters": [{"name": "a", "scale": 1e9}]}, "adapters[0].scale"),
        ({"adapters": [{"name": BASE}]}, "adapters[0].name"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"259": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5]"),
        ({"allowed_token_ids": [1, -1]}, "allowed_token_ids[1]"),
        ({"allowed_token_ids": [1, 259]}, "allowed_token_ids"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"min_tokens": 9, "max_tokens": None, "max_completion_tokens": 8}, "min_tokens"),
    ],
    ids=str,
)
def test_a_fault_is_named_by_its_path_in_a_chat(server: Running, fields: dict[str, Any], param: str) -> None:
    error = refusal(chat(server, **fields))
    assert error["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [5, "a"]}, "prompt[1]"),
        ({"prompt": [[5], [6, -1]]}, "prompt[1][1]"),
        ({"prompt": [[5], []]}, "prompt[1]"),
        ({"prompt": [[5], [259]]}, "prompt[1]"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [{}]}, "prompt[0]"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
    ids=str,
)
def test_a_fault_is_named_by_its_path_in_a_completion(server: Running, fields: dict[str, Any], param: str) -> None:
    assert refusal(complete(server, **fields))["param"] == param


def test_a_length_that_says_nothing_is_refused_with_what_to_do(server: Running) -> None:
    for value in (-1, 0, -1.0):
        assert "leave it out" in refusal(chat(server, max_tokens=value))["message"]


@pytest.mark.parametrize(
    ("post", "fields", "param"),
    [
        (complete, {"prompt": [5] * 512}, "prompt"),
        (complete, {"prompt": [5] * 600, "max_tokens": 600}, "prompt"),
        (complete, {"prompt": [[5], [5] * 512]}, "prompt[1]"),
        (complete, {"prompt": [5] * 500, "max_tokens": 13}, "max_tokens"),
        (chat, {"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
        (chat, {"messages": [{"role": "user", "content": "x" * 600}], "max_tokens": None}, "messages"),
        (chat, {"max_tokens": 600}, "max_tokens"),
        (chat, {"max_completion_tokens": 600}, "max_completion_tokens"),
    ],
)
def test_what_does_not_fit_is_named(server: Running, post: Any, fields: dict[str, Any], param: str) -> None:
    error = refusal(post(server, **fields))
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)


@pytest.mark.parametrize("post", [complete, chat])
def test_a_stream_that_fails_before_its_first_token_is_answered_with_the_status(
    server: Running, monkeypatch: pytest.MonkeyPatch, post: Any
) -> None:
    def fail(request: Request) -> None:
        request.emit(TokenEvent(0, finish_reason=FinishReason.ERROR, error="it broke"))
        request.release()

    monkeypatch.setattr(server.service.engine, "submit", fail)
    answer = post(server, stream=True)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_failed")
    assert answer.headers["content-type"] == "application/json"


@given(st.lists(st.text(min_size=1) | st.integers(0, 9), max_size=5))
def test_a_path_is_whatever_stands_in_it(location: list[str | int]) -> None:
    path = field_path([part for part in location if isinstance(part, int) or not part.startswith("|")])
    assert field_path(["|branch", *location, "|other"]) == path


def test_every_field_of_openais_is_known() -> None:
    """Honoured, in the table, or a tag."""
    for params, own, refused in [
        (completion_create_params.CompletionCreateParamsBase, set(CompletionBody.model_fields), set(COMPLETION)),
        (chat_create_params.CompletionCreateParamsBase, set(ChatBody.model_fields), set(CHAT)),
    ]:
        assert set(params.__annotations__) - own - refused <= TAGS, params
        assert not own & refused
    for message in typing.get_args(chat_completion_message_param.ChatCompletionMessageParam):
        assert set(message.__annotations__) <= {*Message.model_fields, *MESSAGE}


def test_the_page_lists_what_the_tables_refuse() -> None:
    assert refused_list.in_page() == refused_list.listed(), "run python tools/refused_list.py"


def test_every_refusal_says_what_to_do() -> None:
    for refused in (COMPLETION, CHAT, MESSAGE):
        for name, refusal in refused.items():
            assert refusal.remedy.startswith("leave it out"), name
