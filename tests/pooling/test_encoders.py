"""Encoders as bases: every architecture's embeddings by the base and adapters in one batch, as PEFT alone has them."""

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from transformers import AutoTokenizer

from serving import BASE, Running, serving, settings
from swaplora_server.engine.pooling.encoder_runner import EncoderRunner
from swaplora_server.engine.scheduling.batch import Batch, Sampled
from tiny_encoders import ARCHITECTURES, EncoderOracle, Vector, save_encoder, save_feature_adapter

TOLERANCE = 1e-4
RANKS = (1, 4, 8, 16)
TEXT = "the quick brown fox"


class Case:
    """A server of one architecture with adapters, and where their files lie."""

    def __init__(self, running: Running, base: Path, adapters: dict[str, Path]) -> None:
        self.running = running
        self.base = base
        self.adapters = adapters

    def ids_of(self, text: str) -> list[int]:
        ids: list[int] = AutoTokenizer.from_pretrained(self.base).encode(text)
        return ids


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """Steps are small, so that inputs wait for each other."""
    folder = tmp_path_factory.mktemp(request.param)
    base = save_encoder(folder / "base", request.param)
    adapters = {f"r{rank}": save_feature_adapter(folder / f"r{rank}", base, rank, rank) for rank in RANKS}
    config = settings(base, folder / "data", max_batch_tokens=200, max_num_seqs=8, kv_cache_bytes=None)
    with serving(config) as running:
        for name, adapter in adapters.items():
            answer = running.put(name, adapter)
            assert answer.status_code == 201, answer.text
        yield Case(running, base, adapters)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """What the encoder has run since the test began."""
    steps, run = [], EncoderRunner.run

    def noting(self: EncoderRunner, batch: Batch) -> list[Sampled]:
        steps.append(batch)
        return run(self, batch)

    monkeypatch.setattr(EncoderRunner, "run", noting)
    return steps


def embedded(server: Running, model: str, given: Any, **fields: Any) -> list[Vector]:
    body = {"model": model, "input": given, "encoding_format": "base64"} | fields
    answer = server.client.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    return [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in answer.json()["data"]]


def inputs(count: int) -> list[list[int]]:
    """Some have ids that mean padding to the model, and some are as long as may be."""
    rng = np.random.default_rng(0)
    made = [rng.integers(0, 256, rng.integers(1, 100)).tolist() for _ in range(count - 2)]
    return [[5, 1, 1, 7], list(range(128)), *made]


async def test_sixteen_at_once_equal_peft_alone_to_the_same_bits_in_any_company(case: Case, steps: list[Batch]) -> None:
    given = inputs(16)
    names = [BASE, *case.adapters]
    bodies: list[dict[str, Any]] = [
        {"model": names[number % 5], "input": one, "encoding_format": "base64"} for number, one in enumerate(given)
    ]
    limits = httpx.Limits(max_connections=16)
    async with httpx.AsyncClient(base_url=case.running.url, timeout=600, limits=limits) as client:
        together = await asyncio.gather(*(client.post("/v1/embeddings", json=body) for body in bodies))
        assert any(len(step.rows) > 1 for step in steps)
        assert all(not rows.start and rows.stop == rows.sequence.num_tokens for step in steps for rows in step.rows)
        alone = [await client.post("/v1/embeddings", json=body) for body in bodies]
    vectors = [[answer.json()["data"][0]["embedding"] for answer in answers] for answers in (together, alone)]
    assert vectors[0] == vectors[1]
    oracles = {name: EncoderOracle(case.base, case.adapters.get(name)) for name in names}
    for body, vector in zip(bodies, vectors[0], strict=True):
        expected = oracles[str(body["model"])].embedding(body["input"])
        assert np.abs(np.frombuffer(base64.b64decode(vector), "<f4") - expected).max() <= TOLERANCE, body["model"]
    moved = [np.abs(oracles[BASE].embedding(given[3]) - oracles[name].embedding(given[3])).max() for name in names[1:]]
    assert min(moved) > 100 * TOLERANCE


def test_texts_are_read_with_their_special_tokens(case: Case) -> None:
    ids = case.ids_of(TEXT)
    assert (ids[0], ids[-1], len(ids)) == (256, 257, len(TEXT) + 2)
    by_text, by_ids = embedded(case.running, "r4", TEXT)[0], embedded(case.running, "r4", ids)[0]
    assert np.array_equal(by_text, by_ids)
    assert not np.array_equal(by_text, embedded(case.running, "r4", TEXT, add_special_tokens=False)[0])


def test_what_generates_is_refused_by_its_name(case: Case) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "a"},
        "/v1/chat/completions": chat,
        "/v1/responses": {"input": "a"},
        "/v1/messages": {**chat, "max_tokens": 1},
    }
    for path, body in bodies.items():
        answer = case.running.client.post(path, json={"model": "r4", **body})
        assert answer.status_code == 400, (path, answer.text)
        assert "is an encoder, which generates nothing" in answer.json()["error"]["message"], (path, answer.text)


def test_inputs_are_bounded_by_the_bases_positions(case: Case) -> None:
    assert case.running.service.max_model_len == 128
    answer = case.running.client.post("/v1/embeddings", json={"model": BASE, "input": [3] * 129})
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    ids = case.ids_of("x" * 300)
    (cut,) = embedded(case.running, BASE, "x" * 300, truncate_prompt_tokens=-1)
    assert np.array_equal(cut, embedded(case.running, BASE, [*ids[:127], ids[-1]])[0])
