"""Mixtures over HTTP: answers are PEFT's Arrow's, alone and in one batch with all else, whatever becomes of members."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import tiny
from oracle import ArrowOracle, Oracle
from serving import BASE, Running, Streamed, serving, settings, stream_chat

TOLERANCE = 1e-4
PROMPT = list(range(40, 60))
SPECS: dict[str, tuple[list[str], int, float]] = {
    "one": (["a", "b", "c"], 1, 1.0),
    "two": (["a", "b", "c"], 2, 0.3),
    "all": (["d", "c"], 2, 5.0),
}


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("members")
    return {
        name: tiny.save_adapter(folder / name, base, seed=30 + number, rank=6, alpha=7 + number)
        for number, name in enumerate("abcd")
    }


@pytest.fixture(scope="module")
def oracles(base: Path, folders: dict[str, Path]) -> dict[str, Oracle]:
    mixed = {
        name: ArrowOracle(base, [folders[member] for member in members], top_k, temperature)
        for name, (members, top_k, temperature) in SPECS.items()
    }
    return {BASE: Oracle(base), "a": Oracle(base, folders["a"]), **mixed}


def make(server: Running, name: str, members: list[str], top_k: int, temperature: float = 1.0) -> httpx.Response:
    body = {"name": name, "members": members, "top_k": top_k, "temperature": temperature}
    return server.client.post("/v1/mixtures", json=body)


@pytest.fixture(scope="module")
def mixing(server: Running, folders: dict[str, Path]) -> Iterator[Running]:
    for name, folder in folders.items():
        assert server.put(name, folder).status_code == 201
    for name, (members, top_k, temperature) in SPECS.items():
        answer = make(server, name, members, top_k, temperature)
        assert answer.status_code == 201, answer.text
        told = {"object": "mixture", "name": name, "members": members, "top_k": top_k, "temperature": temperature}
        assert answer.json() == told
    yield server
    for name in SPECS:
        server.client.delete(f"/v1/mixtures/{name}")


def ids_of(text: str) -> list[int]:
    return tiny.byte_tokenizer().encode(f"<user>{text}\n<assistant>", add_special_tokens=False)


async def stream_all(server: Running, models: list[str], **fields: Any) -> list[Streamed]:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        return list(
            await asyncio.gather(
                *(stream_chat(client, model, f"say {number}", 16, ignore_eos=True, **fields) for number, model in enumerate(models))
            )
        )


def test_answers_are_pefts_alone_and_in_one_batch(mixing: Running, oracles: dict[str, Oracle]) -> None:
    models = ["one", "two", "all", "a", BASE] * 3
    together = asyncio.run(stream_all(mixing, models))
    for number, (model, said) in enumerate(zip(models, together, strict=True)):
        prompt = ids_of(f"say {number}")
        assert oracles[model].worst_error(prompt, said.token_ids, said.logprobs) <= TOLERANCE
        assert oracles[model].is_greedy(prompt, said.token_ids, 2 * TOLERANCE)
        alone = mixing.generate(model, prompt, 16, ignore_eos=True, logprobs=0).json()["choices"][0]
        assert alone["token_ids"] == said.token_ids
        assert alone["logprobs"]["token_logprobs"] == said.logprobs, "bits must not depend on the company"
        for other in oracles.keys() - {model}:
            assert oracles[other].worst_error(prompt, said.token_ids, said.logprobs) > TOLERANCE
