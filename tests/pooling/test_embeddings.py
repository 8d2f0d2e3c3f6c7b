"""Embeddings of a decoder: what its last token becomes, by the base, adapters, sums and merged models, in one batch."""

import asyncio
import base64
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

import tiny
from hidden_oracle import HiddenOracle, Vector
from serving import BASE, Running, serving, settings
from swaplora_server.engine.scheduling.batch import Batch
from swaplora_server.kernels.step import Wants
from swaplora_server.service.adapter_mix import invoked_at
from swaplora_server.service.pooling import pooling

TOLERANCE = 1e-4
NAMES = tuple(f"a{number}" for number in range(8))
TEXT = "the quick brown fox"
MAX_ROWS, MAX_TOKENS = 6, 48


@pytest.fixture(scope="module")
def loaded(base: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Steps are small, so that prompts come in chunks and more are sent than run."""
    config = settings(base, tmp_path_factory.mktemp("data"), max_batch_tokens=MAX_TOKENS, max_num_seqs=MAX_ROWS)
    with serving(config) as running:
        for name, folder in zip(NAMES, adapters, strict=True):
            assert running.put(name, folder).status_code == 201
        yield running


def ids_of(text: str) -> list[int]:
    ids: list[int] = tiny.byte_tokenizer().encode(text)
    return ids


def ask(server: Running, model: str, given: Any, **fields: Any) -> httpx.Response:
    return server.client.post("/v1/embeddings", json={"model": model, "input": given} | fields)


def embedded(server: Running, model: str, given: Any, **fields: Any) -> list[Vector]:
    """The vectors, from base64, which has all bits."""
    answer = ask(server, model, given, encoding_format="base64", **fields)
    assert answer.status_code == 200, answer.text
    return [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in answer.json()["data"]]


def prompts(count: int, seed: int = 0, longest: int = 90) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, rng.integers(1, longest)).tolist() for _ in range(count)]


async def at_once(server: Running, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    limits = httpx.Limits(max_connections=len(bodies))
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
        answers = await asyncio.gather(*(client.post("/v1/embeddings", json=body) for body in bodies))
    assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers]
    return [answer.json() for answer in answers]


async def test_sixteen_at_once_equal_peft_alone(loaded: Running, base: Path, adapters: list[Path]) -> None:
    folders = [None, *adapters[:7]]
    models = [BASE, *NAMES[:7]]
    given = prompts(16)
    bodies = [{"model": models[number % 8], "input": prompt} for number, prompt in enumerate(given)]
    answers = await at_once(loaded, bodies)
    oracles = [HiddenOracle(base, folder) for folder in folders]
    for number, answer in enumerate(answers):
        expected = oracles[number % 8].embedding(given[number])
        assert np.abs(np.array(answer["data"][0]["embedding"]) - expected).max() <= TOLERANCE
        if number % 8:
            assert np.abs(oracles[0].embedding(given[number]) - expected).max() > 100 * TOLERANCE


def test_what_is_not_normalised_is_the_hidden_state_itself(loaded: Running, base: Path, adapters: list[Path]) -> None:
    (vector,) = embedded(loaded, "a3", TEXT, normalize=False)
    expected = HiddenOracle(base, adapters[3]).hidden(ids_of(TEXT))[-1]
    assert np.abs(vector - expected).max() <= TOLERANCE
    assert abs(np.linalg.norm(vector) - 1) > 0.1


def test_a_sum_of_adapters_and_a_merged_model_answer(
    loaded: Running, base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    terms = [{"name": "a2", "scale": 0.5}, {"name": "a4", "scale": -0.25}]
    (vector,) = embedded(loaded, BASE, TEXT, adapters=terms)
    of_sum = HiddenOracle(base, adapters[2], 0.5, (adapters[4], -0.25))
    assert np.abs(vector - of_sum.embedding(ids_of(TEXT))).max() <= TOLERANCE
    merged = Path(shutil.copytree(adapters[3], tmp_path / "merged"))
    tiny.edit_config(merged, materialise=True)
    assert loaded.put("merged", merged).status_code == 201
    (vector,) = embedded(loaded, "merged", TEXT)
    assert np.abs(vector - HiddenOracle(base, adapters[3]).embedding(ids_of(TEXT))).max() <= TOLERANCE


async def test_the_same_bits_in_any_company_in_chunks_and_from_the_cache(loaded: Running, steps: list[Batch]) -> None:
    given = prompts(12, seed=1)
    models = [BASE, *NAMES]
    bodies = [
        {"model": models[number % 9], "input": prompt, "encoding_format": "base64", "cache_salt": "company"}
        for number, prompt in enumerate(given)
    ]
    stop = threading.Event()

    def generate() -> None:
        while not stop.is_set():
            loaded.token_ids("a5", given[0][:5], max_tokens=20)

    company = threading.Thread(target=generate)
    company.start()
    try:
        together = await at_once(loaded, bodies)
    finally:
        stop.set()
        company.join()
    assert any({rows.wants for rows in step.rows} >= {Wants.HIDDEN, Wants.SAMPLE} for step in steps)
    assert any(rows.start and rows.wants is Wants.HIDDEN for step in steps for rows in step.rows), "nothing was chunked"
    alone = [(await at_once(loaded, [body | {"cache_salt": f"alone {n}"}]))[0] for n, body in enumerate(bodies)]
    cached = [(await at_once(loaded, [body]))[0] for body in bodies]
    vectors = [[answer["data"][0]["embedding"] for answer in answers] for answers in (together, alone, cached)]
    assert vectors[0] == vectors[1] == vectors[2]
    assert max(answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in cached) > 0


def test_all_forms_of_input_are_one_and_floats_are_what_base64_holds(loaded: Running) -> None:
    other, ids = "something else", ids_of(TEXT)
    forms = {"text": TEXT, "texts": [TEXT, other], "ids": ids, "lists of ids": [ids, ids_of(other)]}
    found = {name: embedded(loaded, "a1", given) for name, given in forms.items()}
    assert [len(vectors) for vectors in found.values()] == [1, 2, 1, 2]
    assert all(np.array_equal(vectors[0], found["text"][0]) for vectors in found.values())
    assert np.array_equal(found["texts"][1], found["lists of ids"][1])
    answer = ask(loaded, "a1", forms["texts"]).json()
    assert np.array_equal(np.array([one["embedding"] for one in answer["data"]], np.float32), np.stack(found["texts"]))
    assert [one["index"] for one in answer["data"]] == [0, 1]
    assert np.allclose([np.linalg.norm(one["embedding"]) for one in answer["data"]], 1)


def test_an_answer_says_who_made_it_and_what_it_took(loaded: Running) -> None:
    answer = ask(loaded, "a1", ["abc", "defgh"])
    assert answer.headers["x-swaplora-adapter"] == "a1@1"
    told = answer.json()
    assert (told["object"], told["model"], told["data"][0]["object"]) == ("list", "a1", "embedding")
    assert (told["usage"]["prompt_tokens"], told["usage"]["total_tokens"]) == (8, 8)
    assert "x-swaplora-adapter" not in ask(loaded, BASE, "abc").headers


def test_a_client_of_openai_asks_as_it_does(loaded: Running) -> None:
    with openai.OpenAI(base_url=f"{loaded.url}/v1", api_key="none") as client:
        told = client.embeddings.create(model="a2", input=[TEXT, "b"])
    assert np.allclose(told.data[0].embedding, embedded(loaded, "a2", TEXT)[0])
    assert told.usage.prompt_tokens == len(TEXT) + 1


def test_more_inputs_than_may_wait_are_all_answered_while_others_go_on(
    loaded: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded.service.admissions, "_limit", MAX_ROWS + 1)
    given = [[number % 251, number // 251] for number in range(2048)]
    seen: list[int] = []

    def look() -> None:
        while len(answers) == 0:
            seen.append(len(loaded.token_ids(BASE, [1, 2, 3], max_tokens=1)))

    answers: list[list[Vector]] = []
    beside = threading.Thread(target=look)
    beside.start()
    answers.append(embedded(loaded, BASE, given))
    beside.join()
    assert len(answers[0]) == 2048
    for number in (0, 1, 1000, 2047):
        assert np.array_equal(answers[0][number], embedded(loaded, BASE, given[number])[0])
    assert seen


TRUNCATED = [
    ({"truncate_prompt_tokens": 5}, "the q"),
    ({"truncate_prompt_tokens": 5, "truncation_side": "left"}, "n fox"),
    ({"truncate_prompt_tokens": 500}, TEXT),
    ({"truncate_prompt_tokens": -1}, TEXT),
]


@pytest.mark.parametrize(("fields", "kept"), TRUNCATED)
def test_inputs_are_cut_where_it_is_asked_for(loaded: Running, fields: dict[str, Any], kept: str) -> None:
    (expected,) = embedded(loaded, BASE, kept)
    for given in (TEXT, ids_of(TEXT)):
        assert np.array_equal(embedded(loaded, BASE, given, **fields)[0], expected)


def test_what_does_not_fit_is_cut_to_what_does(loaded: Running) -> None:
    most = loaded.service.max_model_len
    long = "".join(chr(ord("a") + number % 26) for number in range(most + 100))
    assert ask(loaded, BASE, long).json()["error"]["code"] == "context_length_exceeded"
    for side, kept in (("right", long[:most]), ("left", long[-most:])):
        fields = {"truncate_prompt_tokens": -1, "truncation_side": side}
        assert np.array_equal(embedded(loaded, BASE, long, **fields)[0], embedded(loaded, BASE, kept)[0])


def test_dimensions_are_for_bases_that_were_trained_to_be_cut(loaded: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = embedded(loaded, BASE, TEXT, dimensions=32)
    error = ask(loaded, BASE, TEXT, dimensions=8).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_request", "dimensions")
    config = loaded.service.base.model.config
    monkeypatch.setattr(config, "matryoshka_dimensions", [8, 16], raising=False)
    (cut,) = embedded(loaded, BASE, TEXT, dimensions=8)
    assert np.allclose(cut, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-6)
    assert "8, 16 or 32" in ask(loaded, BASE, TEXT, dimensions=12).json()["error"]["message"]
    monkeypatch.setattr(config, "matryoshka_dimensions", None)
    monkeypatch.setattr(config, "is_matryoshka", True, raising=False)
    assert len(embedded(loaded, BASE, TEXT, dimensions=12)[0]) == 12
    assert ask(loaded, BASE, TEXT, dimensions=33).status_code == 400


REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    ({"input": ""}, "invalid_request", "input"),
    ({"input": []}, "invalid_request", "input"),
    ({"input": ["a", ""]}, "invalid_request", "input[1]"),
    ({"input": [[1], []]}, "invalid_request", "input[1]"),
    ({"input": None}, "invalid_request", "input"),
    ({"input": 7}, "invalid_request", "input"),
    ({"input": {"text": "a"}}, "invalid_request", "input"),
    ({"input": [1, "a"]}, "invalid_request", "input[1]"),
    ({"input": [1.5]}, "invalid_request", "input[0]"),
    ({"input": [[259]]}, "invalid_request", "input"),
    ({"input": ["a"] * 2049}, "invalid_request", "input"),
    ({"input": "x" * 10**6}, "context_length_exceeded", "input"),
    ({"input": ["a", "x" * 10**6]}, "context_length_exceeded", "input[1]"),
    ({"encoding_format": "bytes"}, "invalid_request", "encoding_format"),
    ({"dimensions": 0}, "invalid_request", "dimensions"),
    ({"truncate_prompt_tokens": 0}, "invalid_request", "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 513}, "invalid_request", "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "invalid_request", "truncate_prompt_tokens"),
    ({"truncation_side": "middle"}, "invalid_request", "truncation_side"),
    ({"model": "nobody"}, "model_not_found", "model"),
    ({"model": "a1", "adapters": [{"name": "a2"}]}, "invalid_request", "model"),
    ({"messages": [{"role": "user", "content": "a"}]}, "unsupported_field", "messages"),
    ({"embed_dtype": "float16"}, "unsupported_field", "embed_dtype"),
    ({"lora_request": {}}, "unsupported_field", "lora_request"),
]


@pytest.mark.parametrize(("fields", "code", "param"), REFUSED)
def test_what_cannot_be_answered_is_refused_by_its_name(
    loaded: Running, fields: dict[str, Any], code: str, param: str | None
) -> None:
    answer = loaded.client.post("/v1/embeddings", json={"model": BASE, "input": "a"} | fields)
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error


async def test_a_client_that_goes_leaves_nothing_behind(loaded: Running, steps: list[Batch]) -> None:
    given = [[number % 251, number // 251, *range(20)] for number in range(2048)]
    async with httpx.AsyncClient(base_url=loaded.url, timeout=600) as client:
        asked = asyncio.create_task(client.post("/v1/embeddings", json={"model": "a3", "input": given}))
        while not steps:
            assert not asked.done()
            await asyncio.sleep(0.001)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
    await asyncio.to_thread(loaded.wait_idle)
    assert sum(len(step.asking) for step in steps) < 2048
    assert loaded.client.get("/v1/adapters/a3").json()["in_flight"] == 0


def test_an_adapter_whose_numbers_run_over_fails_by_itself(loaded: Running, base: Path, tmp_path: Path) -> None:
    wild = tiny.save_adapter(tmp_path / "wild", base, seed=3, strength=1e18)
    assert loaded.put("wild", wild).status_code == 201
    answer = ask(loaded, "wild", [TEXT, "b"])
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "adapter_failed")
    assert np.isfinite(embedded(loaded, BASE, TEXT)[0]).all()


def test_an_activated_adapters_invocation_is_looked_for_in_one_input_after_the_other(
    loaded: Running, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tiny.save_adapter(tmp_path / "alora", base, seed=3)
    tiny.edit_config(adapter, alora_invocation_tokens=[7])
    assert loaded.put("alora", adapter).status_code == 201
    turns: list[int] = []  # of the event loop, between two inputs
    waited: list[int] = []

    def noting(*given: Any) -> int:
        asyncio.get_running_loop().call_soon(turns.append, 1)
        waited.append(len(turns))
        return invoked_at(*given)

    monkeypatch.setattr(pooling, "invoked_at", noting)
    given = [[number, 7, 9] for number in range(10, 16)]
    vectors = embedded(loaded, "alora", given)
    assert waited == list(range(6))
    of_base = embedded(loaded, BASE, given)
    assert min(np.abs(one - other).max() for one, other in zip(vectors, of_base, strict=True)) > 100 * TOLERANCE
    error = ask(loaded, "alora", [*given, [1, 2]]).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_request", "input[6]")


def test_what_was_embedded_is_counted(loaded: Running) -> None:
    def counted(name: str) -> float:
        lines = loaded.client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    expected = {
        'swaplora_adapter_prompt_tokens_total{adapter="a6"}': 8,
        'swaplora_adapter_poolings_total{adapter="a6",outcome="completed"}': 1,
        'swaplora_adapter_generations_total{adapter="a6"': 0,
        'swaplora_poolings_total{outcome="completed"}': 1,
        "swaplora_pooled_inputs_total": 2,
        "swaplora_generations_total": 0,
        'vllm:request_success_total{engine="0",finished_reason="stop"': 2,
        "vllm:request_generation_tokens_count": 0,
    }
    before = {name: counted(name) for name in expected}
    embedded(loaded, "a6", ["abc", "defgh"])
    assert {name: counted(name) - before[name] for name in expected} == expected
