"""Mixtures over HTTP: answers are PEFT's Arrow's, alone and in one batch with all else, whatever becomes of members."""

import asyncio
import gc
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file
from torch.nn import functional

import tiny
from oracle import ArrowOracle, Oracle
from runs import begin, ended, full
from serving import BASE, Running, Streamed, serving, settings, stream_chat
from swaplora_server.http.mixtures import routes
from swaplora_server.service.adapter_mix import lease_members

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
    ids: list[int] = tiny.byte_tokenizer().encode(f"<user>{text}\n<assistant>", add_special_tokens=False)
    return ids


async def stream_all(server: Running, models: list[str], **fields: Any) -> list[Streamed]:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        return list(
            await asyncio.gather(
                *(
                    stream_chat(client, model, f"say {number}", 16, ignore_eos=True, **fields)
                    for number, model in enumerate(models)
                )
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


def test_a_mixture_is_listed_and_shown(mixing: Running) -> None:
    client = mixing.client
    assert [made["name"] for made in client.get("/v1/mixtures").json()["data"]] == ["all", "one", "two"]
    assert client.get("/v1/mixtures/two").json()["members"] == ["a", "b", "c"]
    listed = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert {"one", "two", "all"} <= listed.keys()
    assert (listed["two"]["root"], listed["two"]["parent"]) == (None, BASE)
    assert client.get("/v1/models/base:two").json() == listed["two"] | {"id": "base:two"}
    assert mixing.token_ids("base:two", PROMPT) == mixing.token_ids("two", PROMPT)
    answer = mixing.generate("two", PROMPT)
    assert answer.headers["x-swaplora-adapter"] == "a@1, b@1, c@1"
    assert answer.json()["model"] == "two"
    assert client.get("/v1/aliases").json()["data"] == []
    assert client.get("/v1/aliases/two").json()["error"]["code"] == "alias_not_found"


def test_a_mixture_shares_cached_blocks_with_itself_alone(mixing: Running) -> None:
    def cached(model: str) -> int:
        usage = mixing.generate(model, [7] * 64, 1).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert make(mixing, "twin", *SPECS["two"]).status_code == 201  # another name for the same
    assert make(mixing, "cooler", ["a", "b", "c"], 2, 0.2).status_code == 201
    assert make(mixing, "turned", ["b", "a", "c"], 2, 0.3).status_code == 201
    asked = [cached(name) for name in ("two", "twin", "cooler", "turned", "a", "one", BASE, "two")]
    assert asked == [0, 48, 0, 0, 0, 0, 0, 48]
    for name in ("twin", "cooler", "turned"):
        assert mixing.client.delete(f"/v1/mixtures/{name}").json() == {"object": "mixture.deleted", "name": name}


def test_a_mixture_is_changed_at_once_and_deleted_once(mixing: Running, folders: dict[str, Path], base: Path) -> None:
    assert make(mixing, "changing", ["a", "b"], 1).status_code == 201
    before = mixing.token_ids("changing", PROMPT, 16)
    assert make(mixing, "changing", ["c", "d@1"], 2, 0.5).status_code == 200
    after = mixing.generate("changing", PROMPT, 16, logprobs=0)
    choice = after.json()["choices"][0]
    oracle = ArrowOracle(base, [folders["c"], folders["d"]], 2, 0.5)
    assert oracle.worst_error(PROMPT, choice["token_ids"], choice["logprobs"]["token_logprobs"]) <= TOLERANCE
    assert after.headers["x-swaplora-adapter"] == "c@1, d@1"
    assert before != choice["token_ids"]
    assert mixing.client.delete("/v1/mixtures/changing").status_code == 200
    assert mixing.client.delete("/v1/mixtures/changing").json()["error"]["code"] == "mixture_not_found"
    assert mixing.generate("changing", PROMPT).json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("changed", "code", "said"),
    [
        ({"members": ["a"]}, "invalid_request", "members"),
        ({"members": []}, "invalid_request", "members"),
        ({"members": ["a", "a"]}, "invalid_request", "a is listed twice"),
        ({"members": ["a", "a@1"]}, "invalid_request", "a is listed twice"),
        ({"members": ["a", "base:a"]}, "invalid_request", "a is listed twice"),
        ({"members": ["a", "nobody"]}, "adapter_not_found", "nobody"),
        ({"members": ["a", "b@9"]}, "version_not_found", "b@9"),
        ({"members": ["a", BASE]}, "invalid_request", "is the base"),
        ({"members": ["a", "alias"]}, "invalid_request", "alias is an alias"),
        ({"members": ["a", "one"]}, "invalid_request", "one is a mixture"),
        ({"members": ["a", "base:one"]}, "invalid_request", "one is a mixture"),
        ({"members": ["a"] * 400}, "invalid_request", "members"),
        ({"members": "a"}, "invalid_request", "members"),
        ({"members": ["a", 7]}, "invalid_request", "members"),
        ({"top_k": 0}, "invalid_request", "top_k"),
        ({"top_k": 3}, "invalid_request", "top_k is 3"),
        ({"top_k": 1.5}, "invalid_request", "top_k"),
        ({"top_k": None}, "invalid_request", "top_k"),
        ({"temperature": 0}, "invalid_request", "temperature"),
        ({"temperature": -1}, "invalid_request", "temperature"),
        ({"temperature": 1e-9}, "invalid_request", "temperature"),
        ({"temperature": 1e30}, "invalid_request", "temperature"),
        ({"temperature": "nan"}, "invalid_request", "temperature"),
        ({"name": BASE}, "invalid_adapter_name", "base"),
        ({"name": "a"}, "invalid_adapter_name", "a is an adapter"),
        ({"name": "alias"}, "invalid_adapter_name", "alias is an alias"),
        ({"name": "../up"}, "invalid_adapter_name", "name"),
        ({"name": "x~y"}, "invalid_adapter_name", "name"),
        ({"name": ""}, "invalid_request", "name"),
        ({"use_gks": True}, "invalid_request", "use_gks"),
        ({"general_adapters": ["c"]}, "invalid_request", "general_adapters"),
        ({"rng_seed": 1}, "invalid_request", "rng_seed"),
        ({"members": ["a", "dora"]}, "invalid_request", "dora@1 cannot be in a mixture: does more than add"),
        ({"members": ["a", "biased"]}, "invalid_request", "biased@1 cannot be in a mixture"),
        ({"members": ["a", "few"]}, "invalid_request", "few@1 cannot be in a mixture: adds to other modules"),
        ({"members": ["few", "a"]}, "invalid_request", "a@1 cannot be in a mixture: adds to other modules"),
        ({"members": ["a", "saving"]}, "invalid_request", "saving@1 cannot be in a mixture: does more than add"),
        ({"members": ["a", "embedding"]}, "invalid_request", "embedding@1 cannot be in a mixture"),
    ],
)
def test_what_cannot_be_a_mixture_is_refused_by_name(
    mixing: Running, odd: None, changed: dict[str, Any], code: str, said: str
) -> None:
    body = {"name": "refused", "members": ["a", "b"], "top_k": 1, "temperature": 1.0} | changed
    answer = mixing.client.post("/v1/mixtures", json=body)
    error = answer.json()["error"]
    assert error["code"] == code, error
    assert said in error["message"], error
    assert "refused" not in [made["name"] for made in mixing.client.get("/v1/mixtures").json()["data"]]


@pytest.fixture(scope="module")
def odd(mixing: Running, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Adapters that are no members, and an alias."""
    folder = tmp_path_factory.mktemp("odd")
    kinds: dict[str, dict[str, Any]] = {
        "dora": {"use_dora": True},
        "biased": {"lora_bias": True},
        "few": {"target_modules": ["q_proj"]},
        "saving": {"modules_to_save": ["norm"]},
        "embedding": {"target_modules": [*tiny.ALL_LINEAR, "embed_tokens"]},
    }
    for name, fields in kinds.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that some could not be merged
            saved = tiny.save_adapter(folder / name, base, seed=5, rank=6, **fields)
        answer = mixing.put(name, saved)
        assert answer.status_code == 201, answer.text
    mixing.client.put("/v1/aliases/alias", json={"target": "a"})
    yield
    mixing.client.delete("/v1/aliases/alias")


def test_no_other_name_takes_a_mixtures_and_it_has_no_place_elsewhere(
    mixing: Running, folders: dict[str, Path]
) -> None:
    client = mixing.client
    assert mixing.put("one", folders["a"]).json()["error"]["code"] == "invalid_adapter_name"
    assert client.put("/v1/aliases/one", json={"target": "a"}).json()["error"]["code"] == "invalid_adapter_name"
    assert client.put("/v1/aliases/other", json={"target": "one"}).json()["error"]["code"] == "adapter_not_found"
    merged = client.post("/v1/merged", json={"name": "merged", "from": [{"name": "one"}]}).json()
    assert merged["error"]["code"] == "adapter_not_found"
    assert client.delete("/v1/aliases/one").json()["error"]["code"] == "alias_not_found"
    assert client.delete("/v1/adapters/one").json()["error"]["code"] == "adapter_not_found"
    assert client.post("/v1/adapters/one/warm").json()["error"]["code"] == "adapter_not_found"
    summed = mixing.generate(BASE, PROMPT, adapters=[{"name": "a"}, {"name": "one"}]).json()["error"]
    assert (summed["code"], summed["param"]) == ("invalid_request", "adapters[1].name")
    assert "one is a mixture" in summed["message"]
    assert mixing.generate("one", PROMPT, adapters=[{"name": "a"}]).json()["error"]["param"] == "model"
    assert mixing.generate("one@1", PROMPT).json()["error"]["code"] == "model_not_found"


def test_of_two_that_make_one_name_at_once_one_is_the_change(mixing: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    both = asyncio.Barrier(2)

    async def together(*given: Any) -> Any:
        await both.wait()
        return await lease_members(*given)

    async def made() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=mixing.url, timeout=60) as client:
            bodies = [{"name": "twice", "members": members, "top_k": 1} for members in (["a", "b"], ["c", "d"])]
            return list(await asyncio.gather(*(client.post("/v1/mixtures", json=body) for body in bodies)))

    with monkeypatch.context() as patched:
        patched.setattr(routes, "lease_members", together)
        answers = {answer.status_code: answer.json() for answer in asyncio.run(made())}
    assert answers.keys() == {201, 200}
    assert mixing.client.get("/v1/mixtures/twice").json() == answers[200]
    mixing.client.delete("/v1/mixtures/twice")


def test_a_mixture_has_no_gate(mixing: Running) -> None:
    body = {"task": [{"prompt": "a", "answer": "b"}], "min_score": 0.5}
    refused = mixing.client.put("/v1/adapters/one/gate", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_request")
    assert "one is a mixture" in refused.json()["error"]["message"]


def said_by(server: Running, name: str) -> str:
    """Its greedy answer to a prompt."""
    body = {"model": name, "prompt": "go on", "max_tokens": 12, "temperature": 0}
    answer = server.client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def test_an_evaluation_asks_a_mixture_of_the_versions_that_it_was_of(
    mixing: Running, base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    for name in "ab":
        mixing.put(f"bound-{name}", folders[name])
    members = ["bound-a", "bound-b"]
    make(mixing, "bound", members, 2, 0.3)
    asked = {"max_tokens": 12}
    task = [
        {"prompt": "go on", "answer": said_by(mixing, "bound")},
        {"prompt": "go", "choices": [" a", " b"], "correct": 0},
    ]
    other = tiny.save_adapter(tmp_path / "other", base, seed=98, rank=6, alpha=60)
    with full(mixing):
        waits = begin(mixing, task, [BASE, "bound", "bound-a"], **asked)
        mixing.put("bound-a", other)
        make(mixing, "bound", [*members, "c"], 1)
    told = ended(mixing, waits["id"])
    cards = [mixing.client.get(f"/v1/adapters/{name}").json() for name in members]
    versions = [card["versions"][-1] if name == "bound-b" else min(card["versions"], key=lambda one: one["version"])
                for name, card in zip(members, cards, strict=True)]  # fmt: skip
    bound = told["models"][1]
    assert bound["mixture"] == {
        "members": [
            {"name": name, "version": 1, "digest": version["digest"]}
            for name, version in zip(members, versions, strict=True)
        ],
        "top_k": 2,
        "temperature": 0.3,
    }
    assert (told["state"], bound["name"], bound["version"]) == ("done", None, None)
    assert told["models"][0]["mixture"] is told["models"][2]["mixture"] is None
    means_then = {one["model"]: one["metrics"]["exact_match"]["mean"] for one in told["results"]}
    assert means_then["bound"] == 1.0
    now = ended(mixing, begin(mixing, task, ["bound"], **asked)["id"])
    assert now["results"][0]["metrics"]["exact_match"]["mean"] == 0.0
    assert now["models"][0]["digest"] != bound["digest"]
    twice = mixing.client.post("/v1/evaluations", json={"task": task, "models": ["bound", "base:bound"]}).json()[
        "error"
    ]
    assert (twice["code"], twice["param"]) == ("invalid_request", "models[1]")
    for name in (waits["id"], now["id"]):
        mixing.client.delete(f"/v1/evaluations/{name}")
    mixing.client.delete("/v1/mixtures/bound")


def test_what_is_made_of_members_counts_as_their_memory(mixing: Running, base: Path, tmp_path: Path) -> None:
    registry, routers = mixing.service.registry, mixing.service.routers
    names = ["counted-1", "counted-2"]
    for number, name in enumerate(names):
        mixing.put(name, tiny.save_adapter(tmp_path / name, base, seed=70 + number, rank=6))
        mixing.token_ids(name, PROMPT)
    before = registry.resident_bytes
    assert make(mixing, "counted", names, 1).status_code == 201
    digests = {mixing.client.get(f"/v1/adapters/{name}").json()["digest"] for name in names}
    made = [of.result() for weights, of in routers._prototypes.items() if weights.digest in digests]  # noqa: SLF001
    vectors = [vector for one in made for vector in one.vectors if vector is not None]
    assert registry.resident_bytes - before == sum(vector.nbytes for vector in vectors) > 0
    mixing.client.delete("/v1/mixtures/counted")
    mixing.wait_idle()
    del made, vectors
    for digest in digests:  # as if others needed the room, and these were pinned
        resident = registry._residency._queue.find(digest)  # noqa: SLF001
        assert resident is not None
        resident.let_go_beside()
    del resident
    gc.collect()
    assert not [weights for weights in routers._prototypes if weights.digest in digests]  # noqa: SLF001
    assert registry.resident_bytes == before
    assert make(mixing, "counted", names, 1).status_code == 201
    assert [each for each in routers._prototypes if each.digest in digests], "made again"  # noqa: SLF001
    mixing.client.delete("/v1/mixtures/counted")
    for name in names:
        assert mixing.client.delete(f"/v1/adapters/{name}").status_code == 200
    mixing.wait_idle()
    gc.collect()
    assert not [weights for weights in routers._prototypes if weights.digest in digests]  # noqa: SLF001


def test_a_member_cannot_be_deleted_from_under_a_mixture(mixing: Running) -> None:
    refused = mixing.client.delete("/v1/adapters/d").json()["error"]
    assert refused["code"] == "adapter_busy"
    assert "all leads there" in refused["message"]


async def test_a_member_that_is_replaced_amid_streams_reaches_new_requests_only(
    mixing: Running, base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    mixing.put("e", folders["a"])
    mixing.put("f", folders["b"])
    assert make(mixing, "live", ["e", "f"], 1).status_code == 201
    new = tiny.save_adapter(tmp_path / "new", base, seed=99, rank=9, alpha=5)

    async def stream(max_tokens: int) -> Streamed:
        async with httpx.AsyncClient(base_url=mixing.url, timeout=60) as client:
            return await stream_chat(client, "live", "hello", max_tokens, ignore_eos=True)

    running = [asyncio.create_task(stream(200)) for _ in range(4)]
    async with asyncio.timeout(60):
        while mixing.service.engine.snapshot().num_running < 4:
            await asyncio.sleep(0.005)
    assert (await asyncio.to_thread(mixing.put, "e", new)).json()["version"] == 2
    after = await stream(20)
    before = await asyncio.gather(*running)
    padded = padded_to(9, folders["b"], tmp_path / "padded")
    oracles = {"e@1, f@1": ArrowOracle(base, [folders["a"], folders["b"]], 1)}
    oracles["e@2, f@1"] = ArrowOracle(base, [new, padded], 1)  # PEFT mixes equal ranks alone
    for said, versions in [*((said, "e@1, f@1") for said in before), (after, "e@2, f@1")]:
        assert said.headers["x-swaplora-adapter"] == versions
        assert oracles[versions].worst_error(ids_of("hello"), said.token_ids, said.logprobs) <= TOLERANCE
    assert oracles["e@1, f@1"].worst_error(ids_of("hello"), after.token_ids, after.logprobs) > TOLERANCE

    mixing.put("e", tiny.save_adapter(tmp_path / "dora", base, seed=5, rank=6, use_dora=True))
    refused = mixing.generate("live", PROMPT).json()["error"]
    assert (refused["code"], refused["param"]) == ("invalid_request", "model")
    assert "e@3 cannot be in a mixture" in refused["message"]
    assert mixing.client.patch("/v1/adapters/e", json={"current": 2}).status_code == 200
    assert mixing.generate("live", PROMPT).status_code == 200
    assert mixing.client.delete("/v1/adapters/e?version=3").status_code == 200
    mixing.client.delete("/v1/mixtures/live")


def padded_to(rank: int, folder: Path, to: Path) -> Path:
    """The same adapter with more ranks, which add nothing."""
    to.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text())
    scaled = config["lora_alpha"] * rank / config["r"]
    (to / "adapter_config.json").write_text(json.dumps(config | {"r": rank, "lora_alpha": scaled}))
    tensors = load_file(folder / "adapter_model.safetensors")
    more = {
        name: functional.pad(tensor, (0, 0, 0, rank - config["r"]) if "lora_A" in name else (0, rank - config["r"]))
        for name, tensor in tensors.items()
    }
    save_file({name: tensor.contiguous() for name, tensor in more.items()}, to / "adapter_model.safetensors")
    return to


def test_a_trace_shows_what_pefts_layers_choose(mixing: Running, oracles: dict[str, Oracle]) -> None:
    for name in ("one", "two"):
        members, top_k, _ = SPECS[name]
        oracle = oracles[name]
        assert isinstance(oracle, ArrowOracle)
        expected = oracle.shares(PROMPT)
        answer = mixing.client.post(f"/v1/mixtures/{name}/trace", json={"prompt": PROMPT})
        assert answer.status_code == 200, answer.text
        traced = answer.json()
        assert traced["members"] == [f"{member}@1" for member in members]
        assert [token["id"] for token in traced["tokens"]] == PROMPT
        assert {module["module"] for module in traced["modules"]} == expected.keys()
        assert {module["layer"] for module in traced["modules"]} == {0, 1}
        for module in traced["modules"]:
            of_peft = expected[module["module"]]
            for token, (taken, shares) in enumerate(zip(module["members"], module["shares"], strict=True)):
                assert len(taken) == top_k
                assert shares == sorted(shares, reverse=True)
                for member, share in zip(taken, shares, strict=True):
                    assert abs(float(of_peft[token, member]) - share) < 1e-4
        again = mixing.client.post(f"/v1/mixtures/{name}/trace", json={"prompt": PROMPT})
        assert again.json() == traced, "what is cached must not be missing"
    text = mixing.client.post("/v1/mixtures/one/trace", json={"prompt": "hi"}).json()
    assert [token["text"] for token in text["tokens"]] == ["h", "i"]


async def test_prompts_that_are_traced_at_once_beside_others_each_see_their_own(mixing: Running) -> None:
    prompts = [[60 + number] * (100 + number) for number in range(6)]

    async def traced(client: httpx.AsyncClient, prompt: list[int]) -> Any:
        return (await client.post("/v1/mixtures/two/trace", json={"prompt": prompt})).json()

    async with httpx.AsyncClient(base_url=mixing.url, timeout=60) as client:
        beside = asyncio.create_task(stream_all(mixing, ["two", "a", BASE, "one"]))
        together = await asyncio.gather(*(traced(client, prompt) for prompt in prompts))
        await beside
        alone = [await traced(client, prompt) for prompt in prompts]
    assert together == alone


@pytest.mark.parametrize(
    ("name", "body", "code"),
    [
        ("nobody", {"prompt": "x"}, "mixture_not_found"),
        ("a", {"prompt": "x"}, "mixture_not_found"),
        ("one", {"prompt": ""}, "invalid_request"),
        ("one", {"prompt": []}, "invalid_request"),
        ("one", {"prompt": [9999]}, "invalid_request"),
        ("one", {"prompt": "x" * 257}, "invalid_request"),
        ("one", {"prompt": [5] * 257}, "invalid_request"),
        ("one", {"prompt": "x", "max_tokens": 3}, "invalid_request"),
        ("one", {}, "invalid_request"),
    ],
)
def test_a_trace_that_cannot_be_is_refused(mixing: Running, name: str, body: dict[str, Any], code: str) -> None:
    error = mixing.client.post(f"/v1/mixtures/{name}/trace", json=body).json()["error"]
    assert error["code"] == code, error


def test_mixtures_are_there_after_a_restart(base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    with serving(settings(base, tmp_path)) as server:
        for name in ("a", "b"):
            server.put(name, folders[name])
        assert make(server, "kept", ["b", "a"], 2, 0.25).status_code == 201
        assert make(server, "gone", ["b", "a"], 1).status_code == 201
        server.client.delete("/v1/mixtures/gone")
        told, answer = server.client.get("/v1/mixtures").json(), server.token_ids("kept", PROMPT)
    for catalogue in tmp_path.glob("catalogue*"):
        catalogue.unlink()  # what the files say of themselves is enough
    with serving(settings(base, tmp_path)) as server:
        assert server.client.get("/v1/mixtures").json() == told
        assert [made["name"] for made in told["data"]] == ["kept"]
        assert server.token_ids("kept", PROMPT) == answer


def test_members_that_do_not_fit_in_memory_together_are_refused(
    base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    with serving(settings(base, tmp_path, adapter_memory_bytes=40_000)) as server:
        for name in ("a", "b"):
            assert server.put(name, folders[name]).status_code == 201
            assert server.generate(name, PROMPT).status_code == 200
        error = make(server, "large", ["a", "b"], 1).json()["error"]
        assert (error["code"], error["param"]) == ("adapter_too_large", "members"), error
