"""What answers say as text: joined to the prompt, with the bytes of each token, stopped where they should be."""

import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tokenizers import Tokenizer

import tiny
from serving import BASE, Running, Streamed, read_event, serving, settings
from swaplora_server.engine.request import Logprobs
from swaplora_server.service import generation
from swaplora_server.service.detokenize import Detokenizer, Settled, TextRules
from tokenizer_kinds import KINDS, for_models


@pytest.fixture(scope="module", params=["byte_fallback", "byte_level"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def said_by(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of a random base whose every token is about as likely as another."""
    tokenizer = KINDS[kind]
    special = {f"{name}_token_id": tokenizer.token_to_id(token) for name, token in (("bos", "<s>"), ("eos", "</s>"))}
    fields = {**tiny.LLAMA, **special, "vocab_size": tokenizer.get_vocab_size() + 3, "pad_token_id": None}
    folder = tiny.save_tiny_base(tmp_path_factory.mktemp("base"), fields)
    for_models(tokenizer).save_pretrained(folder)
    with serving(settings(folder, tmp_path_factory.mktemp("data"))) as running:
        yield running


def complete(server: Running, **fields: Any) -> dict[str, Any]:
    body = {"model": BASE, "prompt": "ab a b", "max_tokens": 24, "temperature": 2.0, "return_token_ids": True}
    answer = server.client.post("/v1/completions", json=body | fields)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def chat(server: Running, **fields: Any) -> dict[str, Any]:
    said = server.client.post("/v1/chat/completions", json=chat_body(**fields))
    assert said.status_code == 200, said.text
    choice: dict[str, Any] = said.json()["choices"][0]
    return choice


def chat_body(**fields: Any) -> dict[str, Any]:
    return {
        "model": BASE,
        "messages": [{"role": "user", "content": "ab"}],
        "max_tokens": 24,
        "temperature": 2.0,
        "logprobs": True,
        "top_logprobs": 20,
        "return_token_ids": True,
    } | fields


def streamed(server: Running, **fields: Any) -> tuple[Streamed, bytes]:
    """A chat's stream, and the bytes of its logprobs."""
    said, data = Streamed({}), b""
    with server.client.stream("POST", "/v1/chat/completions", json=chat_body(stream=True, **fields)) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                read_event(said, line.removeprefix("data: "))
                choices = [] if said.is_done else json.loads(line.removeprefix("data: ")).get("choices", [])
                data += b"".join(map(bytes_of, choices))
    return said, data


def bytes_of(choice: dict[str, Any]) -> bytes:
    return b"".join(bytes(token["bytes"]) for token in (choice["logprobs"] or {"content": []})["content"])


@pytest.mark.parametrize("skips", [True, False])
def test_prompt_and_completion_are_what_the_ids_decode_to(said_by: Running, kind: str, skips: bool) -> None:
    tokenizer: Tokenizer = KINDS[kind]
    compared = 0
    for seed in range(20):
        choice = complete(said_by, seed=seed, max_tokens=5, skip_special_tokens=skips)
        ended = choice["finish_reason"] == "stop"
        ids = choice["token_ids"][:-1] if ended else choice["token_ids"]
        prompt = tokenizer.decode(choice["prompt_token_ids"], skip_special_tokens=skips)
        whole = tokenizer.decode(choice["prompt_token_ids"] + ids, skip_special_tokens=skips)
        if "\ufffd" not in whole:
            assert prompt + choice["text"] == whole
            compared += 1
    assert compared


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_text_keeps_the_space_that_it_begins_with(said_by: Running, kind: str, path: str) -> None:
    said: dict[str, Any] = {"prompt": "ab", "messages": [{"role": "user", "content": "ab"}]}
    body = said | {"model": BASE, "max_tokens": 1, "n": 100, "temperature": 3.0, "return_token_ids": True}
    spaced = [token_id for piece, token_id in KINDS[kind].get_vocab().items() if piece in ("▁a", "▁ab", "Ġa", "Ġab")]
    texts = []
    for seed in itertools.count(0, 1000):
        for choice in said_by.client.post(path, json=body | {"seed": seed}).json()["choices"]:
            if choice["token_ids"][0] in spaced:
                texts.append(choice["text"] if "text" in choice else choice["message"]["content"])
        if texts:
            break
    assert {*texts} <= {" a", " ab"}


@pytest.mark.parametrize("fields", [{}, {"ignore_eos": True}, {"skip_special_tokens": False, "ignore_eos": True}])
def test_the_bytes_of_logprobs_are_those_of_the_content(said_by: Running, fields: dict[str, Any]) -> None:
    for seed in range(12):
        choice = chat(said_by, seed=seed, **fields)
        content, tokens = choice["message"]["content"], choice["logprobs"]["content"]
        assert bytes_of(choice).decode(errors="replace") == content
        assert len(tokens) == len(choice["token_ids"]) - (choice["finish_reason"] == "stop")
        for token in tokens:
            names = [other["token"] for other in token["top_logprobs"] if other["bytes"]]
            assert len(set(names)) == len(names)


def test_a_stream_says_the_same_with_the_same_logprobs(said_by: Running) -> None:
    for seed in range(6):
        fields: dict[str, Any] = {"seed": seed, "stop": ["a", "b ", "<|end|>"], "min_tokens": seed, "max_tokens": 40}
        whole = chat(said_by, **fields)
        said, data = streamed(said_by, **fields)
        assert (said.text, said.finish_reason) == (whole["message"]["content"], whole["finish_reason"])
        assert said.token_ids == whole["token_ids"]
        assert said.logprobs == [token["logprob"] for token in whole["logprobs"]["content"]]
        assert data == bytes_of(whole)
        assert data.decode(errors="replace") == said.text


def test_a_stop_string_is_neither_in_the_content_nor_in_the_logprobs(said_by: Running) -> None:
    free = chat(said_by, seed=3, max_tokens=60, ignore_eos=True)["message"]["content"]
    for stop in {free[10:11], free[20:23], free[5:6]} - {""}:
        choice = chat(said_by, seed=3, max_tokens=60, ignore_eos=True, stop=[stop])
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["content"] == free[: free.index(stop)] == bytes_of(choice).decode(errors="replace")
        kept = chat(said_by, seed=3, max_tokens=60, ignore_eos=True, stop=[stop], include_stop_str_in_output=True)
        assert kept["message"]["content"] == free[: free.index(stop) + len(stop)]
        assert bytes_of(kept).decode(errors="replace") == kept["message"]["content"]


def test_a_stop_string_that_is_a_special_token_stops_there(said_by: Running, kind: str) -> None:
    end = KINDS[kind].token_to_id("<|end|>")
    body: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True, "temperature": 3.0}
    seed = next(seed for seed in range(100) if end in complete(said_by, seed=seed, **body)["token_ids"])
    free = complete(said_by, seed=seed, **body)
    stopped = complete(said_by, seed=seed, stop="<|end|>", **body)
    place = free["token_ids"].index(end)
    assert stopped["finish_reason"] == "stop"
    assert stopped["token_ids"] == free["token_ids"][: place + 1]
    assert "<|end|>" not in stopped["text"]
    assert free["text"].startswith(stopped["text"].rstrip("\ufffd"))
    held = complete(said_by, seed=seed, stop="<|end|>", min_tokens=place + 1, **body)
    assert len(held["token_ids"]) > place + 1


def test_min_tokens_holds_back_stop_strings_stop_ids_and_end_tokens_alike(said_by: Running, kind: str) -> None:
    tokenizer = KINDS[kind]
    everything = {"stop": list("ab .<"), "stop_token_ids": [tokenizer.token_to_id("a"), tokenizer.token_to_id("ab")]}
    for seed in range(8):
        for min_tokens in (0, 1, 7):
            choice = complete(said_by, seed=seed, min_tokens=min_tokens, max_tokens=30, **everything)
            assert len(choice["token_ids"]) > min_tokens
            before = choice["token_ids"][:min_tokens]
            assert not {tokenizer.token_to_id("a"), tokenizer.token_to_id("</s>")} & {*before}


def test_the_end_token_is_in_the_text_only_when_both_are_asked_for(said_by: Running, kind: str) -> None:
    end = KINDS[kind].token_to_id("</s>")
    body: dict[str, Any] = {"max_tokens": 400, "temperature": 3.0}
    seed = next(seed for seed in range(100) if end in complete(said_by, seed=seed, **body)["token_ids"])
    shown = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    assert "</s>" not in complete(said_by, seed=seed, **body)["text"]
    assert complete(said_by, seed=seed, **body, **shown)["text"].endswith("</s>")


class BreaksFor:
    """Makes detokenizers of which those of one prompt break at their third token."""

    def __init__(self, prompt: list[int]) -> None:
        self.end = prompt[-4:]

    def __call__(self, rules: TextRules, prompt_ids: Sequence[int], **options: bool) -> Detokenizer:
        made = Broken if list(prompt_ids) == self.end else Detokenizer
        return made(rules, prompt_ids, **options)


class Broken(Detokenizer):
    pushed = 0

    def push(self, token_id: int, logprobs: Logprobs | None = None) -> Settled:
        self.pushed += 1
        if self.pushed == 3:
            raise RuntimeError("a planted fault")
        return super().push(token_id, logprobs)


def test_a_failure_in_making_text_ends_its_own_request_alone(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    neighbour, broken = list(range(40, 60)), list(range(60, 80))
    expected = server.generate(BASE, neighbour, 60).json()["choices"][0]
    monkeypatch.setattr(generation, "Detokenizer", BreaksFor(broken))
    body = {"model": BASE, "max_tokens": 60, "temperature": 0}
    with ThreadPoolExecutor(3) as pool:
        beside = pool.submit(server.generate, BASE, neighbour, 60)
        whole = pool.submit(server.client.post, "/v1/completions", json={**body, "prompt": broken, "n": 2})
        lines = pool.submit(server.client.post, "/v1/completions", json={**body, "prompt": broken, "stream": True})
    assert beside.result().json()["choices"][0] == expected
    assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (503, "engine_failed")
    assert "planted" not in whole.result().text + lines.result().text
    events = [line for line in lines.result().text.split("\n\n") if line]
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "engine_failed"
    assert events[-1] == "data: [DONE]"
    assert len(events) == 4  # two tokens before it
    server.wait_idle()
    monkeypatch.undo()
    assert server.generate(BASE, broken, 60).status_code == 200
