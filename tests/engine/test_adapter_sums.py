"""Weighted sums of adapters per request: exactly the sum of their deltas, in the shared batch."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tiny
from oracle import Oracle
from serving import BASE, Running

TOLERANCE = 1e-4
PROMPT = list(range(40, 60))
SCALES = {"a": 0.7, "b": -0.4}


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of different rank and targets."""
    folder = tmp_path_factory.mktemp("sums")
    a = tiny.save_adapter(folder / "a", base, seed=11, rank=8)
    b = tiny.save_adapter(folder / "b", base, seed=12, rank=3, target_modules=["q_proj", "down_proj"], use_rslora=True)
    return {"a": a, "b": b}


@pytest.fixture(scope="module")
def summed(base: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """A stock model whose weights PEFT has changed by each adapter's delta times its scale."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    for name, scale in SCALES.items():
        fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        merged = PeftModel.from_pretrained(fresh, str(folders[name])).merge_and_unload()
        for key, weight in merged.state_dict().items():
            weights[key] += scale * (weight - model.state_dict()[key])
    model.load_state_dict(weights)
    folder = tmp_path_factory.mktemp("summed")
    model.save_pretrained(folder)
    return Oracle(folder)


@pytest.fixture(scope="module")
def server(server: Running, folders: dict[str, Path]) -> Running:
    for name, folder in folders.items():
        assert server.put(name, folder).status_code == 201
    return server


def terms(**scales: float) -> list[dict[str, object]]:
    return [{"name": name, "scale": scale} for name, scale in scales.items()]


def chat(server: Running, **fields: object) -> tuple[list[int], list[float], dict[str, str]]:
    body = {"model": BASE, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 24, "temperature": 0}
    extra = {"logprobs": True, "return_token_ids": True, "ignore_eos": True}
    answer = server.client.post("/v1/chat/completions", json=body | extra | fields)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return choice["token_ids"], [entry["logprob"] for entry in choice["logprobs"]["content"]], dict(answer.headers)


def test_a_sum_is_the_sum_of_the_deltas(server: Running, summed: Oracle, base: Path) -> None:
    prompt = tiny.byte_tokenizer().encode("<user>hello\n<assistant>", add_special_tokens=False)
    ids, logprobs, headers = chat(server, adapters=terms(**SCALES))
    assert summed.worst_error(prompt, ids, logprobs) <= TOLERANCE
    assert summed.is_greedy(prompt, ids, 2 * TOLERANCE)
    assert headers["x-swaplora-adapter"] == "a@1, b@1"
    assert headers["x-swaplora-digest"].count("sha256:") == 2
    assert Oracle(base).worst_error(prompt, ids, logprobs) > 100 * TOLERANCE, "the sum must move the output"
    for wrong in (terms(a=0.7), terms(a=0.7, b=0.4), terms(a=1.0, b=-0.4)):
        ids, logprobs, _ = chat(server, adapters=wrong)
        assert summed.worst_error(prompt, ids, logprobs) > TOLERANCE


def test_a_sum_of_one_at_scale_one_is_the_adapter_bit_for_bit(server: Running) -> None:
    assert chat(server, adapters=terms(a=1.0))[:2] == chat(server, model="a")[:2]


def test_no_terms_are_the_base(server: Running) -> None:
    assert chat(server, adapters=[])[:2] == chat(server)[:2]


def test_another_scale_finds_nothing_in_the_prefix_cache(server: Running) -> None:
    def cached(**scales: float) -> int:
        body = {"model": BASE, "prompt": PROMPT * 3, "max_tokens": 1, "adapters": terms(**scales)}
        usage = server.client.post("/v1/completions", json=body).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert [cached(a=0.5, b=1.0), cached(a=0.5, b=1.0), cached(a=0.25, b=1.0), cached(a=0.5)] == [0, 48, 0, 0]


def test_a_stream_of_a_sum_gives_its_leases_back(server: Running) -> None:
    body = {"model": BASE, "prompt": PROMPT, "max_tokens": 9, "stream": True, "n": 3, "adapters": terms(**SCALES)}
    with server.client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.headers["x-swaplora-adapter"] == "a@1, b@1"
        assert [line for line in answer.iter_lines() if line][-1] == "data: [DONE]"
    server.wait_idle()
    assert [server.client.get(f"/v1/adapters/{name}").json()["in_flight"] for name in SCALES] == [0, 0]


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"adapters": [{"name": "a"}, {"name": "nobody"}]}, 404, "model_not_found", "adapters[1].name"),
        ({"adapters": [{"name": "a"}, {"name": "a@9"}]}, 404, "version_not_found", None),
        ({"model": "a", "adapters": [{"name": "b"}]}, 400, "invalid_request", "model"),
        ({"adapters": [{"name": BASE}]}, 400, "invalid_request", "adapters[0].name"),
        ({"adapters": [{"name": "a", "weight": 1}]}, 400, "invalid_request", "adapters[0].weight"),
        ({"adapters": [{"name": "a", "scale": 1e9}]}, 400, "invalid_request", "adapters[0].scale"),
        ({"adapters": [{"name": "a"}] * 17}, 400, "invalid_request", "adapters"),
        ({"adapters": "a"}, 400, "invalid_request", "adapters"),
    ],
)
def test_a_sum_that_cannot_be_had_is_refused_whole(
    server: Running, fields: dict[str, object], status: int, code: str, param: str | None
) -> None:
    answer = server.client.post("/v1/completions", json={"model": BASE, "prompt": PROMPT} | fields)
    error = json.loads(answer.text)["error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    assert param is None or error["param"] == param
    server.wait_idle()
    assert server.client.get("/v1/adapters/a").json()["in_flight"] == 0
