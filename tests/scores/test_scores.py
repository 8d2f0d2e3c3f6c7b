"""Cross-encoders of each kind of pair encoding, in one batch with embeddings: their scores are PEFT's alone."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from serving import BASE, Running, serving, settings
from tiny_heads import save_classifier
from tiny_pairs import DECODER, PairOracle, save_pair_base

TOLERANCE = 1e-4
# with segments, with two separators and positions of its own, with neither, with distances, and a decoder
KINDS = ("bert", "roberta", "modernbert", "deberta-v2", DECODER)
CROSS = {"first": 1, "second": 2}  # their seeds
WORDS = ("the", "quick", "brown", "fox", "and", "a", "lazy", "dog", "ran")


class Case:
    """A server of one architecture with two cross-encoders."""

    def __init__(self, running: Running, base: Path, adapters: dict[str, Path]) -> None:
        self.running = running
        self.base = base
        self.adapters = adapters


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """Steps are small, so that pairs wait for each other."""
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    base = save_pair_base(folder / "base", name)
    adapters = {own: save_classifier(folder / own, base, name, seed=seed, num_labels=1) for own, seed in CROSS.items()}
    kv = {"kv_cache_bytes": 4 << 20 if name == DECODER else None}
    with serving(settings(base, folder / "data", max_batch_tokens=150, max_num_seqs=8, **kv)) as running:
        for own, adapter in adapters.items():
            answer = running.put(own, adapter)
            assert answer.status_code == 201, answer.text
        yield Case(running, base, adapters)


def texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(count)]


async def test_sixteen_at_once_of_adapters_and_base_equal_peft_alone(case: Case) -> None:
    queries, documents = texts(16), texts(32)
    models = [*CROSS, BASE]
    bodies: list[dict[str, Any]] = [
        {"model": models[number % 3], "text_1": query, "text_2": documents[2 * number : 2 * number + 2]}
        for number, query in enumerate(queries)
    ]
    async with httpx.AsyncClient(base_url=case.running.url, timeout=600) as client:
        together = await asyncio.gather(*(client.post("/score", json=body) for body in bodies))
        alone = [await client.post("/score", json=body) for body in bodies]
        every_text = {"model": BASE, "input": [*queries, *documents]}
        embedded = (await client.post("/v1/embeddings", json=every_text)).json()["data"]
    vectors = dict(zip([*queries, *documents], [np.array(one["embedding"]) for one in embedded], strict=True))
    oracles = {name: PairOracle(case.base, folder) for name, folder in case.adapters.items()}
    for body, answer, again in zip(bodies, together, alone, strict=True):
        assert answer.status_code == 200, answer.text
        for document, told in zip(body["text_2"], answer.json()["data"], strict=True):
            query = body["text_1"]
            oracle = oracles.get(body["model"])
            right = float(vectors[query] @ vectors[document]) if oracle is None else oracle.score(query, document)
            assert abs(told["score"] - right) <= TOLERANCE, body["model"]
        assert answer.json()["data"] == again.json()["data"], "other bits in company"
    first, second = (oracle.score(queries[0], documents[0]) for oracle in oracles.values())
    assert abs(first - second) > 100 * TOLERANCE


def test_pairs_are_cut_as_transformers_cuts_them(case: Case) -> None:
    query, document = "the quick brown fox " * 3, "a lazy dog ran " * 9
    oracle = PairOracle(case.base, case.adapters["first"])
    longest = case.running.service.max_model_len
    for most, sent in ((40, 40), (min(longest, 180), 180 if longest > 180 else -1)):
        for side in ("left", "right"):
            oracle.tokenizer.truncation_side = side
            options = {"truncation": "longest_first", "max_length": most}
            body = {"model": "first", "text_1": query, "text_2": document, "use_activation": False}
            cut = body | {"truncate_prompt_tokens": sent, "truncation_side": side}
            (told,) = case.running.client.post("/score", json=cut).json()["data"]
            assert abs(told["score"] - oracle.logit(query, document, options)) <= TOLERANCE, (most, side)
