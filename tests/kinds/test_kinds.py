"""Every kind of adapter over HTTP, in one batch with the others, a sum and the base: each row what PEFT gives alone."""

import asyncio
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

import peft_kinds
from kinds_batch import Company, content, gathered, is_right, num_submitted, prompt_of, slug
from kinds_oracle import KindOracle
from kinds_table import INVOCATION, Made, make_all
from planted_faults import neighbours_weights, unproven
from serving import BASE, Running, Streamed, serving, settings, stream_chat
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.registry import loader
from swaplora_adapters.weights import linears
from swaplora_adapters.weights.load import load_weights
from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.engine.lora.modules import LoraEmbedding
from swaplora_server.engine.lora.routing import replaced_rows
from swaplora_server.kernels.cpu import adapter_tables
from swaplora_server.kernels.cpu.linear import CpuLinear
from swaplora_server.service import generation

# of PEFT's: a base stored with its embeddings, tied heads, biases that merging could not keep, Conv1D
pytestmark = pytest.mark.filterwarnings("ignore")
MAX_TOKENS = {"llama": 48, "qwen2": 48, "gpt2": 24, "mixtral": 32}
Companies = Callable[[str], Company]


@pytest.fixture(scope="module")
def companies(tmp_path_factory: pytest.TempPathFactory) -> Companies:
    """The kinds of a base, made once."""
    made: dict[str, Company] = {}

    def company_of(base: str) -> Company:
        if base not in made:
            folder = tmp_path_factory.mktemp(base)
            base_folder = peft_kinds.save_base(base, folder / "base")
            served = list(make_all(base, base_folder, folder))
            made[base] = Company(base_folder, served, MAX_TOKENS[base])
        return made[base]

    return company_of


@pytest.fixture(scope="module")
def llama(companies: Companies) -> Company:
    return companies("llama")


@pytest.fixture(scope="module")
def server(llama: Company, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Every kind of the llama base on one server."""
    with serving(settings(llama.base, tmp_path_factory.mktemp("data"))) as running:
        llama.upload(running)
        yield running


@pytest.mark.parametrize("base", MAX_TOKENS)
async def test_every_kind_in_one_batch_says_what_peft_says_alone(
    base: str, companies: Companies, tmp_path: Path
) -> None:
    company = companies(base)
    with serving(settings(company.base, tmp_path)) as running:
        company.upload(running)
        with gathered(running, len(company.members)) as steps:
            answers = await company.ask(running)
    assert steps.most == len(company.members)
    assert {len(said.token_ids) for said in answers.values()} == {company.max_tokens}
    assert company.wrong(answers) == set()
    assert company.unmoved(answers) == {BASE}


async def test_a_file_in_bfloat16_says_what_peft_says_with_it(llama: Company, tmp_path: Path) -> None:
    stored = [narrowed(made, llama.base, tmp_path / slug(made.kind)) for made in llama.made if is_narrowable(made)]
    company = replace(llama, made=stored)
    with serving(settings(llama.base, tmp_path / "data")) as running:
        company.upload(running)
        with gathered(running, len(company.members)):
            answers = await company.ask(running)
    assert company.wrong(answers) == set()
    assert llama.wrong(answers) >= {slug(made.kind) for made in stored}, "rounding must show"


def is_narrowable(made: Made) -> bool:
    """Not those whose files hold copies of the base's embeddings, which PEFT would put in the base's place."""
    return not any("base_layer" in name or "original" in name for name in load_file(made.folder / WEIGHTS_FILE))


def narrowed(made: Made, base: Path, folder: Path) -> Made:
    folder.mkdir()
    shutil.copy(made.folder / CONFIG_FILE, folder)
    tensors = load_file(made.folder / WEIGHTS_FILE)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    return Made(made.kind, folder, KindOracle(base, folder, made.kind))


async def test_three_continuations_of_every_kind_are_each_its_own(server: Running, llama: Company) -> None:
    async def three(client: httpx.AsyncClient, number: int) -> list[Streamed]:
        messages = [{"role": "user", "content": content(number)}]
        options = {"n": 3, "temperature": 0, "max_tokens": 24, "logprobs": True, "ignore_eos": True}
        body = {**options, "messages": messages, "return_token_ids": True, **llama.members[number].fields}
        choices = (await client.post("/v1/chat/completions", json=body)).json()["choices"]
        logprobs = [[token["logprob"] for token in choice["logprobs"]["content"]] for choice in choices]
        return [Streamed({}, choice["token_ids"], own) for choice, own in zip(choices, logprobs, strict=True)]

    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        with gathered(server, len(llama.members) + 2):
            answers = await asyncio.gather(*(three(client, number) for number in range(len(llama.members))))
    for member, number, said in zip(llama.members, range(len(answers)), answers, strict=True):
        assert [is_right(member.oracle, prompt_of(content(number)), one) for one in said] == [True] * 3, member.name


async def test_neighbours_that_go_away_change_nothing_for_those_that_stay(server: Running, llama: Company) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        with gathered(server, len(llama.members)) as steps:
            tasks = [
                asyncio.create_task(llama.stream(client, member, number, max_tokens=160 if number % 2 else 48))
                for number, member in enumerate(llama.members)
            ]
            async with asyncio.timeout(60):
                while len(steps.keys) < 12:
                    await asyncio.sleep(0.005)
            for task in tasks[1::2]:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(said, asyncio.CancelledError) for said in ended) == len(tasks[1::2])
    stayed = [said for said in ended if isinstance(said, Streamed)]
    assert llama.wrong({member.name: said for member, said in zip(llama.members[::2], stayed, strict=True)}) == set()


async def test_kinds_that_are_evicted_and_loaded_again_say_the_same(
    llama: Company, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []

    def counted(digest: str, *arguments: Any) -> AdapterWeights:
        loads.append(digest)
        return load_weights(digest, *arguments)

    monkeypatch.setattr(loader, "load_weights", counted)
    with serving(settings(llama.base, tmp_path, adapter_memory_bytes=240_000)) as small:
        llama.upload(small)
        for _ in range(2):
            assert llama.wrong(await llama.ask(small, max_tokens=16)) == set()
    assert len(loads) > len(set(loads)) == len(llama.made)


async def test_all_kinds_as_versions_of_one_name_run_side_by_side(llama: Company, tmp_path: Path) -> None:
    versions, tasks = list(llama.made), []
    with serving(settings(llama.base, tmp_path, keep_versions=len(versions))) as running:
        async with httpx.AsyncClient(base_url=running.url, timeout=60) as client:
            with gathered(running, len(versions)) as steps:
                for number, made in enumerate(versions, 1):
                    assert (await asyncio.to_thread(running.put, "turning", made.folder)).json()["version"] == number
                    tasks.append(asyncio.create_task(stream_chat(client, "turning", content(0), 48, ignore_eos=True)))
                    await until_submitted(running, number)
                answers = await asyncio.gather(*tasks)
    assert steps.most == len(versions)
    for number, (made, said) in enumerate(zip(versions, answers, strict=True), 1):
        assert said.headers["x-swaplora-adapter"] == f"turning@{number}"
        assert is_right(made.oracle, prompt_of(content(0)), said), made.kind


async def until_submitted(running: Running, count: int) -> None:
    engine = running.service.engine
    async with asyncio.timeout(60):
        while num_submitted(engine) < count:
            await asyncio.sleep(0.002)


def test_what_comes_before_an_invocation_is_shared_with_the_base(server: Running, llama: Company) -> None:
    oracle = next(made.oracle for made in llama.made if made.kind == "alora")
    prompt = [*range(100, 140), *INVOCATION, *range(30, 50)]
    for first, second in ((BASE, "alora"), ("alora", BASE)):
        apart = [ask(server, name, prompt, cache_salt=f"{first} alone {name}") for name in (first, second)]
        together = [ask(server, name, prompt, cache_salt=first) for name in (first, second)]
        assert [num_cached for _, num_cached in apart + together] == [0, 0, 0, 32]
        assert [ids for ids, _ in together] == [ids for ids, _ in apart]
        said = dict(zip((first, second), (ids for ids, _ in together), strict=True))
        assert oracle.is_greedy(prompt, said["alora"], tie=2e-4)
        assert llama.plain.is_greedy(prompt, said[BASE], tie=2e-4)
        assert not llama.plain.is_greedy(prompt, said["alora"], tie=2e-4)
    assert ask(server, "alora", prompt, cache_salt="alora")[1] == 48, (
        "blocks from the invocation on are the adapter's own"
    )


def ask(server: Running, model: str, prompt: list[int], **fields: object) -> tuple[list[int], int]:
    answer = server.generate(model, prompt, 32, ignore_eos=True, **fields).json()
    return answer["choices"][0]["token_ids"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def norms_of_the_base_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(linears, "row_norms", lambda weight, _A, _B: torch.linalg.vector_norm(weight, dim=1))


def biases_dropped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(linears, "_shift", lambda _parts, _column_scale: None)


def own_head_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        "swaplora_server.engine.lora.modules.replaced_rows",
        lambda rows, path: () if path == "lm_head" else replaced_rows(rows, path),
    )


def own_norms_in_layers_ignored(patch: pytest.MonkeyPatch) -> None:
    unproven(patch)
    address = adapter_tables._address  # noqa: SLF001 - whatever fused layers know of a module comes from it
    patch.setattr(
        adapter_tables, "_address", lambda own, norms: address(own, norms) if isinstance(own, CpuLinear) else None
    )


def looked_up_rows_ignored(patch: pytest.MonkeyPatch) -> None:
    unproven(patch)
    patch.setattr(LoraEmbedding, "_change", lambda *_: None)


def invocation_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(generation, "invoked_at", lambda *_: 0)


WITH_BIASES = {"lora_only", "all-biases", "lora_bias", "lora_bias-and-all", "dora", "dora-and-biases", "adalora-pruned"}
IN_EMBEDDINGS = {"embedding", "embedding-and-head", "tied-embedding"}
TRAINED_TOKENS = {"tokens-tied", "tokens-tied-head-with-factors", "tokens-two-lists", "tokens-one-list-twice"}
FAULTS: dict[Callable[[pytest.MonkeyPatch], None], tuple[str, set[str]]] = {
    norms_of_the_base_alone: ("llama", {"dora-patterns", "dora-head"}),
    biases_dropped: ("qwen2", {*WITH_BIASES, "sum"}),
    own_head_ignored: ("llama", {"saved-head", "saved-embedding-tied"}),
    own_norms_in_layers_ignored: ("llama", {"saved-norms"}),
    looked_up_rows_ignored: ("llama", IN_EMBEDDINGS | TRAINED_TOKENS),
    invocation_ignored: ("llama", {"alora"}),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_the_comparison_finds_a_planted_fault_and_whom_it_strikes(
    fault: Callable[[pytest.MonkeyPatch], None], companies: Companies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, struck = FAULTS[fault]
    fault(monkeypatch)
    assert await found_wrong(companies(base), tmp_path) == struck


async def test_the_comparison_finds_a_neighbours_adapter_on_every_row(
    llama: Company, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    neighbours_weights(monkeypatch)
    assert await found_wrong(llama, tmp_path) >= {slug(made.kind) for made in llama.made}


async def found_wrong(company: Company, data_dir: Path) -> set[str]:
    with serving(settings(company.base, data_dir)) as running:
        company.upload(running)
        with gathered(running, len(company.members)):
            return company.wrong(await company.ask(running))
