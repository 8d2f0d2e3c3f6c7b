"""Token ids that come from outside: none of them ever indexes what is not there."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
from serving import BASE, Running, serving, settings
from swaplora_server.base.base_model import vocab_size_of
from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.engine.request import Request, SamplingParams, Sequence
from swaplora_server.engine.sampling.sampler import Sampler

PROMPT = list(range(40, 60))
LAST = tiny.VOCAB_SIZE - 1


@pytest.mark.parametrize("token_id", [LAST + 1, 151645, 2**31 - 1])
@pytest.mark.parametrize("field", ["stop_token_ids", "prompt", "allowed_token_ids", "logit_bias"])
def test_an_id_beyond_the_vocabulary_is_refused_by_the_name_of_its_field(
    server: Running, field: str, token_id: int
) -> None:
    body = {"model": BASE, "prompt": PROMPT, "max_tokens": 4, "min_tokens": 1}
    answer = server.client.post(
        "/v1/completions", json=body | {field: {"1": 1, str(token_id): 1} if field == "logit_bias" else [1, token_id]}
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_request", field)
    assert f"{token_id} is not in the base's vocabulary, whose ids end at {LAST}" in error["message"]


def test_the_last_id_of_the_vocabulary_can_stop_and_be_read(server: Running) -> None:
    answer = server.generate(BASE, [LAST], stop_token_ids=[0, LAST], min_tokens=8, ignore_eos=True)
    assert answer.status_code == 200
    assert not {0, LAST} & set(answer.json()["choices"][0]["token_ids"])


def test_end_tokens_of_the_base_beyond_its_vocabulary_are_left_out(tmp_path: Path) -> None:
    base = tiny.save_tiny_base(tmp_path / "base")
    path = base / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [tiny.EOS, 400, -1]}))
    with serving(settings(base, tmp_path / "data", log_level="error")) as running:
        assert running.service.base.eos_token_ids == {tiny.EOS}
        assert tiny.EOS not in running.token_ids(BASE, PROMPT, min_tokens=8)


def test_more_alternatives_than_there_are_tokens_are_all_there_are() -> None:
    request = Request("r", (1,), SamplingParams(1, temperature=0.0, num_logprobs=20), lambda _event: None)
    (sampled,) = Sampler().sample(torch.arange(5.0).unsqueeze(0), [Sequence(request, 0)])
    assert sampled.logprobs is not None
    assert [token_id for token_id, _logprob in sampled.logprobs.top] == [4, 3, 2, 1, 0]


def test_a_base_that_says_what_it_cannot_read_is_refused() -> None:
    embedding = nn.Embedding(10, 4)
    assert vocab_size_of(embedding, 10) == 10
    assert vocab_size_of(embedding, 8) == 8
    with pytest.raises(UnsupportedModelError, match="12 tokens, and has embeddings for 10"):
        vocab_size_of(embedding, 12)
