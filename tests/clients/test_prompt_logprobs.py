"""Log-probabilities of prompts and of answers: PEFT's own, in OpenAI's and vLLM's shapes, as tools read them."""

import json
from operator import itemgetter
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch

import tiny
from oracle import Oracle
from serving import BASE, Running, serving, settings
from swaplora_server.engine.scheduling.batch import Batch
from swaplora_server.service import generation
from swaplora_server.service.generating import decoder_engine

TOLERANCE = 1e-4  # of a log-probability, in float32
PROMPT = [*range(40, 75), 200, 31, *range(90, 60, -1)]
TEXT = "once upon a time"


def ask(server: Running, model: str = BASE, prompt: Any = PROMPT, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "seed": 1234} | fields
    answer = server.client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def echoed(server: Running, model: str = BASE, prompt: Any = PROMPT, **fields: Any) -> dict[str, Any]:
    """The logprobs of the first choice, its prompt's first."""
    choice = ask(server, model, prompt, **{"echo": True, "logprobs": 1} | fields)["choices"][0]
    logprobs: dict[str, Any] = choice["logprobs"]
    assert len({len(logprobs[name]) for name in ("text_offset", "token_logprobs", "tokens", "top_logprobs")}) == 1
    return logprobs


def expected(oracle: Oracle, token_ids: list[int]) -> list[float]:
    """Of each token but the first."""
    rows = oracle.logprobs(token_ids)[:-1]
    found: list[float] = rows[torch.arange(len(rows)), torch.tensor(token_ids[1:])].tolist()
    return found


@pytest.fixture(scope="module")
def tuned(server: Running, base: Path, adapters: list[Path]) -> Oracle:
    """Of the adapter `tuned`, which the server has."""
    assert server.put("tuned", adapters[5]).status_code == 201
    return Oracle(base, adapters[5])


@pytest.fixture(scope="module")
def narrow(base: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server whose steps hold few tokens, score fewer, and whose cache holds about two prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder_engine, "SCORED_LOGITS", 7 * tiny.VOCAB_SIZE)
        config = settings(
            base, tmp_path_factory.mktemp("narrow"), max_batch_tokens=24, max_num_seqs=8, kv_cache_bytes=60 << 10
        )
        with serving(config) as running:
            assert running.put("tuned", adapters[5]).status_code == 201
            yield running


def test_a_prompts_logprobs_are_pefts(server: Running, tuned: Oracle, base: Path) -> None:
    for model, oracle in ((BASE, Oracle(base)), ("tuned", tuned)):
        for _ in range(2):  # the second time the prompt is in the cache, or would be
            ask(server, model)
            told = echoed(server, model, return_token_ids=True)
            assert told["token_logprobs"][0] is None
            assert told["token_logprobs"][1 : len(PROMPT)] == pytest.approx(expected(oracle, PROMPT), abs=TOLERANCE)
    assert expected(Oracle(base), PROMPT) != pytest.approx(expected(tuned, PROMPT), abs=100 * TOLERANCE)


def test_in_chunks_beside_others_and_computed_again_they_are_the_same(narrow: Running, tuned: Oracle) -> None:
    """Eight prompts at once through a cache that holds two: chunks of seven scored rows, and preemptions."""
    prompts = [[number, *PROMPT, *range(number + 10, number + 20)] for number in range(8)]
    choices = ask(narrow, "tuned", prompts, max_tokens=4, echo=True, logprobs=0, ignore_eos=True, return_token_ids=True)
    for choice, prompt in zip(choices["choices"], prompts, strict=True):
        whole = prompt + choice["token_ids"]
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected(tuned, whole), abs=TOLERANCE)


def test_a_step_scores_no_more_rows_than_it_may(narrow: Running, steps: list[Batch]) -> None:
    ask(narrow, BASE, [PROMPT, PROMPT[::-1]], prompt_logprobs=0)
    scored = [sum(rows.num_scored for rows in batch.rows) for batch in steps]
    assert max(scored) == 7
    assert sum(scored) == 2 * (len(PROMPT) - 1)


def test_of_a_sum_they_are_the_sums(server: Running, tuned: Oracle) -> None:
    terms = [{"name": "tuned", "scale": 1.0}]
    assert echoed(server, BASE, adapters=terms)["token_logprobs"] == echoed(server, "tuned")["token_logprobs"]
    halved = echoed(server, BASE, adapters=[{"name": "tuned", "scale": 0.5}])["token_logprobs"][1:-1]
    assert halved != pytest.approx(expected(tuned, PROMPT), abs=10 * TOLERANCE)


def loglikelihoods(outputs: dict[str, Any], context_lengths: list[int]) -> list[tuple[float, bool]]:
    """As lm-eval's local-completions reads an answer, word for word but for names."""
    found = []
    for choice, length in zip(sorted(outputs["choices"], key=itemgetter("index")), context_lengths, strict=False):
        token_logprobs = choice["logprobs"]["token_logprobs"][length:-1]
        top_logprobs = choice["logprobs"]["top_logprobs"][length:-1]
        is_greedy = all(token == max(top.values()) for token, top in zip(token_logprobs, top_logprobs, strict=False))
        found.append((sum(token_logprobs), is_greedy))
    return found


def test_an_evaluation_harness_reads_what_peft_says(server: Running, tuned: Oracle) -> None:
    """Several prompts of token ids at once, a greedy continuation and one that is not among them."""
    context = PROMPT[:20]
    greedy = server.token_ids("tuned", context, 6, ignore_eos=True)
    prompts = [context + greedy, [*context, greedy[0], (greedy[1] + 1) % 256], PROMPT[:7], [*context, tiny.EOS]]
    lengths = [20, 20, 1, 20]
    body = {"model": "tuned", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    answer = server.client.post("/v1/completions", json=body | {"echo": True})
    assert answer.status_code == 200, answer.text
    found = loglikelihoods(answer.json(), lengths)
    sums = [sum(expected(tuned, prompt)[length - 1 :]) for prompt, length in zip(prompts, lengths, strict=True)]
    assert [total for total, _ in found] == pytest.approx(sums, abs=10 * TOLERANCE)
    assert [is_greedy for _, is_greedy in found][:2] == [True, False]


def test_the_token_that_ends_an_answer_is_counted_among_its_logprobs(server: Running) -> None:
    """Else who takes the last off, which is generated, would take one of the prompt's."""
    ended = ask(server, echo=True, logprobs=1, logit_bias={str(tiny.EOS): 100})["choices"][0]
    assert ended["finish_reason"] == "stop"
    assert ended["logprobs"]["tokens"][len(PROMPT) :] == ["<|eos|>"]
    assert ended["logprobs"]["text_offset"][-1] == len(ended["text"])


def test_where_nothing_is_to_be_generated_the_prompt_comes_back_alone(server: Running) -> None:
    answer = ask(server, prompt=TEXT, max_tokens=0, echo=True, logprobs=2)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
    assert choice["logprobs"]["tokens"] == list(TEXT)
    assert choice["logprobs"]["text_offset"] == list(range(len(TEXT)))
    assert answer["usage"]["completion_tokens"] == 0
    filled = [1] * server.service.max_model_len
    assert ask(server, prompt=filled, max_tokens=0, echo=True)["usage"]["prompt_tokens"] == len(filled)


def test_an_echo_is_the_prompt_and_then_the_answer(server: Running) -> None:
    plain = ask(server, prompt=[TEXT, "and"], max_tokens=9, n=2, ignore_eos=True, temperature=1)
    with_echo = ask(server, prompt=[TEXT, "and"], max_tokens=9, n=2, ignore_eos=True, temperature=1, echo=True)
    texts = [
        prompt + choice["text"] for prompt, choice in zip([TEXT, TEXT, "and", "and"], plain["choices"], strict=True)
    ]
    assert [choice["text"] for choice in with_echo["choices"]] == texts
    assert all(choice["logprobs"] is None for choice in with_echo["choices"])


def test_a_character_in_parts_has_its_bytes_and_one_place(server: Running) -> None:
    ids = tiny.byte_tokenizer().encode("aß→😀", add_special_tokens=False)
    told = ask(server, prompt=ids, max_tokens=0, echo=True, logprobs=0)["choices"][0]
    assert told["text"] == "aß→😀"
    assert told["logprobs"]["tokens"][:3] == ["a", "bytes:\\xc3", "bytes:\\x9f"]
    assert told["logprobs"]["text_offset"] == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]


@pytest.mark.parametrize(("cut", "shown"), [(1, "a\ufffd"), (3, "aß\ufffd")])
def test_a_prompt_that_ends_amid_a_character_is_echoed_as_one_text(server: Running, cut: int, shown: str) -> None:
    ids = tiny.byte_tokenizer().encode("aß→", add_special_tokens=False)[: 1 + cut]
    whole = ask(server, prompt=ids, max_tokens=4, echo=True, ignore_eos=True, return_token_ids=True)["choices"][0]
    assert whole["text"] == tiny.byte_tokenizer().decode(ids + whole["token_ids"], skip_special_tokens=True)
    assert ask(server, prompt=ids, max_tokens=0, echo=True)["choices"][0]["text"] == shown


def test_the_likeliest_are_named_with_the_token_itself(server: Running) -> None:
    for count in (0, 1, 20):
        told = echoed(server, logprobs=count)
        entries = (told[key][1:] for key in ("tokens", "token_logprobs", "top_logprobs"))
        for name, logprob, top in zip(*entries, strict=True):
            assert top[name] == logprob
            assert count <= len(top) <= count + 1
            assert max(1, count) <= len(top)


def test_prompt_logprobs_are_vllms(server: Running, tuned: Oracle) -> None:
    told = ask(server, "tuned", prompt_logprobs=2)["choices"][0]["prompt_logprobs"]
    rows = tuned.logprobs(PROMPT)
    assert told[0] is None
    for place, entry in enumerate(told[1:], 1):
        logprob, rank = (entry[str(PROMPT[place])][key] for key in ("logprob", "rank"))
        assert logprob == pytest.approx(float(rows[place - 1][PROMPT[place]]), abs=TOLERANCE)
        assert rank == 1 + int((rows[place - 1] > rows[place - 1][PROMPT[place]]).sum())
        assert set(entry) == {str(PROMPT[place]), *map(str, rows[place - 1].topk(2).indices.tolist())}
        assert sorted(one["rank"] for one in entry.values())[:2] == [1, 2]
    assert entry[str(PROMPT[-1])]["decoded_token"] == tiny.byte_tokenizer().decode([PROMPT[-1]])
    both = ask(server, "tuned", prompt_logprobs=2, echo=True, logprobs=0)["choices"][0]
    assert both["prompt_logprobs"] == told
    assert all(len(top) == 1 for top in both["logprobs"]["top_logprobs"][1:])


def test_a_chat_has_those_of_its_prompt_beside_its_choices(server: Running) -> None:
    body = {"model": BASE, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "n": 2}
    answer = server.client.post("/v1/chat/completions", json=body | {"prompt_logprobs": 0, "return_token_ids": True})
    told = answer.json()
    prompt = told["choices"][0]["prompt_token_ids"]
    assert [list(entry) for entry in told["prompt_logprobs"][1:]] == [[str(token)] for token in prompt[1:]]
    assert "prompt_logprobs" not in told["choices"][0]


def test_a_stream_echoes_first_and_says_the_same(server: Running) -> None:
    fields: dict[str, Any] = {
        "max_tokens": 6,
        "n": 2,
        "echo": True,
        "logprobs": 1,
        "ignore_eos": True,
        "seed": 5,
        "temperature": 1,
    }
    whole = ask(server, prompt=[TEXT, "é"], **fields)["choices"]
    body = {"model": BASE, "prompt": [TEXT, "é"], "stream": True, **fields}
    texts, logprobs = [""] * 4, [dict[str, Any]() for _ in range(4)]
    with server.client.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                if not texts[choice["index"]]:
                    assert choice["text"] == (TEXT, "é")[choice["index"] // 2]
                texts[choice["index"]] += choice["text"]
                for name, values in (choice["logprobs"] or {}).items():
                    logprobs[choice["index"]].setdefault(name, []).extend(values)
    assert texts == [choice["text"] for choice in whole]
    assert logprobs == [choice["logprobs"] for choice in whole]


def test_the_best_are_the_likeliest_a_token(server: Running) -> None:
    fields: dict[str, Any] = {"max_tokens": 5, "temperature": 1, "seed": 3, "prompt": [PROMPT, PROMPT[:9]]}
    all_of_them = ask(server, **fields, n=6, logprobs=0)["choices"]
    best = ask(server, **fields, n=2, best_of=6, return_token_ids=True)
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    assert [choice["prompt_token_ids"] for choice in best["choices"]] == [PROMPT, PROMPT, PROMPT[:9], PROMPT[:9]]
    assert all(choice["logprobs"] is None for choice in best["choices"])
    for number in range(2):
        means = {
            choice["text"]: -sum(logprobs) / len(logprobs)
            for choice in all_of_them[6 * number : 6 * number + 6]
            for logprobs in [choice["logprobs"]["token_logprobs"]]
        }
        assert [choice["text"] for choice in best["choices"][2 * number : 2 * number + 2]] == sorted(
            means, key=means.__getitem__
        )[:2]
    assert best["usage"] == ask(server, **fields, n=6)["usage"] | {"prompt_tokens_details": {"cached_tokens": ANY}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": False, "logprobs": 1}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"max_tokens": False, "echo": True}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens"),
        ({"echo": "yes"}, "echo"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"prompt": [[1] * 300] * 100, "prompt_logprobs": 20}, "prompt[0]"),
        ({"prompt": [1] * 300, "logprobs": 20, "echo": True, "n": 11, "stream": True}, "prompt"),
    ],
)
def test_what_has_no_meaning_is_refused_by_its_field(server: Running, fields: dict[str, Any], param: str) -> None:
    answer = server.client.post("/v1/completions", json={"model": BASE, "prompt": PROMPT} | fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_null_and_what_asks_for_nothing_are_as_if_left_out(server: Running) -> None:
    fields: dict[str, Any] = {"echo": None, "logprobs": None, "best_of": None, "prompt_logprobs": None}
    assert ask(server, **fields)["choices"] == ask(server)["choices"] == ask(server, best_of=1)["choices"]


def test_much_is_written_beside_the_event_loop_and_is_the_same(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ask(server, echo=True, logprobs=3)["choices"]
    monkeypatch.setattr(generation, "LONG_ECHO_TOKENS", 0)
    assert ask(server, echo=True, logprobs=3)["choices"] == short
