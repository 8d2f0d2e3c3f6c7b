"""Evaluations of a running server: what they come to, in whose company they run, how they end and what is kept."""

import itertools
import json
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from oracle import Oracle
from runs import GUARD_SECONDS, begin, ended, full, get, means
from serving import BASE, Running, serving, settings
from swaplora_server.access.caller import KeyScope
from swaplora_server.access.key_file import create_key
from swaplora_server.engine.engine import Engine
from swaplora_server.engine.request import LAST_PRIORITY, Request
from swaplora_server.evaluation.task import Item, parse_task
from swaplora_server.service.errors import RequestError
from swaplora_server.service.evaluations import asking, evaluations, running
from swaplora_server.service.evaluations.evaluations import NUM_AT_ONCE, Evaluations
from swaplora_server.service.evaluations.record import Evaluated, Evaluation
from swaplora_server.service.generating.task import GenerationTask
from swaplora_server.service.generation import Generation, generate
from swaplora_server.service.service import Service

NUM_TOKENS = 6
PROMPTS = [f"number {number} of many:" for number in range(8)]
CHOICES = [" yes", " certainly so", " no"]
MODELS = (BASE, "a", "b@1")
ITEM = {"prompt": "a", "answer": "b"}


@pytest.fixture(scope="module")
def server(base: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With the adapters `a` and `b`, the second in two versions."""
    with serving(settings(base, tmp_path_factory.mktemp("data"))) as running_server:
        for name, number in (("a", 4), ("b", 5), ("b", 6)):
            assert running_server.put(name, adapters[number]).is_success
        yield running_server


def said(server: Running, model: str, prompt: str) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}
    text: str = server.client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    return text


def chatted(server: Running, model: str, content: str) -> str:
    messages = [{"role": "user", "content": content}]
    body = {"model": model, "messages": messages, "max_tokens": NUM_TOKENS, "temperature": 0}
    text: str = server.client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    return text


@pytest.fixture(scope="module")
def task(server: Running) -> list[dict[str, Any]]:
    """Whose answers are what `a` says, and choices."""
    answers = [{"prompt": prompt, "answer": said(server, "a", prompt)} for prompt in PROMPTS[:6]]
    chats = [
        {"messages": [{"role": "user", "content": prompt}], "answer": chatted(server, "a", prompt)}
        for prompt in PROMPTS[6:]
    ]
    choices = [{"prompt": f"{prompt} ", "choices": CHOICES, "correct": n % 3} for n, prompt in enumerate(PROMPTS)]
    return [*answers, *chats, *choices, {"prompt": "x", "regex": "."}, {"prompt": "x", "schema": {"type": "object"}}]


@pytest.fixture(scope="module")
def told(server: Running, task: list[dict[str, Any]]) -> dict[str, Any]:
    """What the task came to with nothing beside it."""
    return ended(server, begin(server, task, MODELS, max_tokens=NUM_TOKENS)["id"])


def test_answers_are_those_that_the_same_requests_get(
    server: Running, task: list[dict[str, Any]], told: dict[str, Any]
) -> None:
    assert (told["state"], told["error"]) == ("done", None)
    assert told["progress"] == {"done": 3 * len(task), "total": 3 * len(task)}
    found = means(told)
    assert found["a"]["exact_match"] == 1.0
    for model in (BASE, "b@1"):
        same = [said(server, model, item["prompt"]).strip() == item["answer"].strip() for item in task[:6]]
        same += [
            chatted(server, model, prompt).strip() == task[6 + n]["answer"].strip()
            for n, prompt in enumerate(PROMPTS[6:])
        ]
        assert found[model]["exact_match"] == sum(same) / len(same) < 1
    assert all(each["regex"] == 1.0 for each in found.values())
    assert all(each["valid_json"] == 0.0 for each in found.values())


def test_choices_are_taken_by_the_log_probabilities_that_peft_gives(
    base: Path, adapters: list[Path], told: dict[str, Any]
) -> None:
    encode = tiny.byte_tokenizer().encode
    for model, oracle in ((BASE, Oracle(base)), ("a", Oracle(base, adapters[4])), ("b@1", Oracle(base, adapters[5]))):
        num_right = {"acc": 0, "acc_norm": 0}
        for number, prompt in enumerate(PROMPTS):
            sums = []
            for choice in CHOICES:  # space behind the prompt is the choice's
                token_ids = encode(f"{prompt} {choice}")
                rows = oracle.logprobs(token_ids)[:-1]
                each = rows[torch.arange(len(rows)), torch.tensor(token_ids[1:])]
                sums.append(float(each[len(encode(prompt)) - 1 :].sum()))
            right = number % 3
            num_right["acc"] += max(range(3), key=sums.__getitem__) == right
            num_right["acc_norm"] += max(range(3), key=lambda n: sums[n] / len(CHOICES[n])) == right
        assert {name: means(told)[model][name] * len(PROMPTS) for name in num_right} == num_right, model


def test_results_say_of_what_they_are(server: Running, task: list[dict[str, Any]], told: dict[str, Any]) -> None:
    digests = {one["name"]: one["digest"] for one in server.client.get("/v1/adapters").json()["data"]}
    versions = server.client.get("/v1/adapters/b").json()["versions"]
    assert told["task"] == {"digest": parse_task(task).digest, "num_items": len(task)}
    first = next(one["digest"] for one in versions if one["version"] == 1)
    assert told["models"] == [
        {"model": BASE, "name": None, "version": None, "digest": None, "mixture": None},
        {"model": "a", "name": "a", "version": 1, "digest": digests["a"], "mixture": None},
        {"model": "b@1", "name": "b", "version": 1, "digest": first, "mixture": None},
    ]
    score = told["results"][1]["metrics"]["score"]
    assert score["num"] == len(task)
    assert 0 < score["low"] < score["mean"] < score["high"] < 1
    assert [pair["models"] for pair in told["comparisons"]] == [[BASE, "a"], [BASE, "b@1"], ["a", "b@1"]]
    assert all(pair["num"] == len(task) and 0 < pair["p_value"] <= 1 for pair in told["comparisons"])


def test_beside_live_requests_each_has_the_bits_that_it_has_alone(
    server: Running, task: list[dict[str, Any]], told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = [(model, list(range(30 + number, 50 + number))) for number, model in enumerate([BASE, "a", "b"] * 4)]

    def ask(model: str, prompt: list[int]) -> Any:
        return server.generate(model, prompt, 12, logprobs=2).json()["choices"]

    submitted: list[Request] = []
    submit = Engine.submit

    def noting(self: Engine, request: Request) -> None:
        submitted.append(request)
        submit(self, request)

    monkeypatch.setattr(Engine, "submit", noting)
    alone = [ask(*each) for each in live]
    assert all(request.priority == 0 for request in submitted)
    lines = "\n".join(map(json.dumps, task))
    name = begin(server, lines, MODELS, max_tokens=NUM_TOKENS)["id"]
    beside: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda n=n, each=each: beside.update({n: ask(*each)})) for n, each in enumerate(live)
    ]
    for thread in threads:
        thread.start()
    again = ended(server, name)
    for thread in threads:
        thread.join(GUARD_SECONDS)
    assert [beside[number] for number in range(len(live))] == alone
    same = ("task", "models", "results", "comparisons", "fingerprint")
    assert {key: again[key] for key in same} == {key: told[key] for key in same}
    assert sum(request.priority == LAST_PRIORITY for request in submitted) == len(submitted) - 2 * len(live)


def test_no_more_run_at_once_than_are_allowed_and_none_while_the_server_is_full(
    server: Running, task: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    submit = Engine.submit

    def counting(self: Engine, request: Request) -> None:
        counted.append(server.service.admissions.num_sequences)
        submit(self, request)

    monkeypatch.setattr(Engine, "submit", counting)
    with full(server):
        names = [begin(server, task, MODELS, max_tokens=1)["id"] for _ in range(2)]
        assert server.token_ids("a", [5], 1)  # what is live is let in
        del counted[:]
        deadline = time.monotonic() + GUARD_SECONDS
        while get(server, names[0])["state"] != "running":
            assert time.monotonic() < deadline
        time.sleep(5 * asking.LOOK_SECONDS)
        assert not counted
        assert [get(server, name)["state"] for name in names] == ["running", "queued"]
        assert get(server, names[0])["progress"]["done"] == 0
    assert [ended(server, name)["state"] for name in names] == ["done", "done"]
    assert 1 <= max(counted) <= NUM_AT_ONCE


def test_a_cancelled_one_keeps_what_has_come_and_a_deleted_one_nothing(
    server: Running, task: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with full(server):
        name, waiting = (begin(server, task, MODELS)["id"] for _ in range(2))
        cancelled = server.client.post(f"/v1/evaluations/{name}/cancel").json()
        assert (cancelled["state"], cancelled["progress"]["done"]) == ("cancelled", 0)
        assert server.client.post(f"/v1/evaluations/{name}/cancel").json() == cancelled == get(server, name)
        deleted = server.client.delete(f"/v1/evaluations/{waiting}")
        assert deleted.json() == {"object": "evaluation.deleted", "id": waiting}
        assert server.client.delete(f"/v1/evaluations/{waiting}").status_code == 404
        assert not (server.service.settings.data_dir / "evaluations" / f"{waiting}.json").exists()
    noted = threading.Event()
    note = Evaluation.note

    def noting(self: Evaluation, model: int, item: int, scores: list[float]) -> None:
        note(self, model, item, scores)
        noted.set()

    monkeypatch.setattr(Evaluation, "note", noting)
    name = begin(server, task * 20, MODELS, max_tokens=64)["id"]
    assert noted.wait(GUARD_SECONDS)
    partly = server.client.post(f"/v1/evaluations/{name}/cancel").json()
    assert partly["state"] == "cancelled"
    assert 0 < partly["progress"]["done"] < partly["progress"]["total"]
    assert (
        sum(result["metrics"].get("score", {"num": 0})["num"] for result in partly["results"])
        == partly["progress"]["done"]
    )
    server.wait_idle()


@pytest.mark.parametrize(("method", "url", "state"), [("POST", "/cancel", "cancelled"), ("DELETE", "", None)])
def test_one_that_is_ended_before_it_has_begun_stays_so(
    server: Running, monkeypatch: pytest.MonkeyPatch, method: str, url: str, state: str | None
) -> None:
    saved: queue.SimpleQueue[Evaluation] = queue.SimpleQueue()
    saves, may_save = itertools.count(), threading.Event()
    save = Evaluations.save

    def late(self: Evaluations, evaluation: Evaluation) -> None:
        saved.put(evaluation)
        assert next(saves) or may_save.wait(GUARD_SECONDS)
        save(self, evaluation)

    monkeypatch.setattr(Evaluations, "save", late)
    told: list[dict[str, Any]] = []
    beginning = threading.Thread(target=lambda: told.append(begin(server, [ITEM], ["a"])))
    beginning.start()
    one = saved.get(timeout=GUARD_SECONDS)
    assert server.client.request(method, f"/v1/evaluations/{one.id}{url}").status_code == 200
    may_save.set()
    beginning.join(GUARD_SECONDS)
    assert told[0]["state"] == "cancelled"
    assert (one.state, one.num_done, one.id in server.service.evaluations.runs) == ("cancelled", 0, False)
    kept = server.client.get(f"/v1/evaluations/{one.id}").json()
    assert kept.get("state") == state


def test_who_is_at_a_limit_holds_no_place_and_memory_is_not_awaited_for_ever(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = RequestError("rate_limited", "no tokens are left", retry_seconds=3600)
    refused = threading.Semaphore(0)

    async def limited(service: Service, task: GenerationTask) -> Generation:
        if task.model == "a@1":
            refused.release()
            raise refusal
        return await generate(service, task)

    monkeypatch.setattr(asking, "generate", limited)
    waiting = begin(server, [ITEM] * NUM_AT_ONCE, ["a"])["id"]
    for _ in range(NUM_AT_ONCE):
        assert refused.acquire(timeout=GUARD_SECONDS)
    server.service.evaluations.turns.clear()  # as of another tenant
    assert ended(server, begin(server, [ITEM], ["b"], max_tokens=1)["id"])["state"] == "done"
    assert get(server, waiting)["state"] == "running"
    server.client.post(f"/v1/evaluations/{waiting}/cancel")
    refusal = RequestError("memory_full", "the memory is full", retry_seconds=0)
    monkeypatch.setattr(asking, "_MEMORY_SECONDS", 0.01)
    monkeypatch.setattr(asking, "MEMORY_PATIENCE_SECONDS", 0.02)
    failed = ended(server, begin(server, [ITEM], ["a"])["id"])
    assert (failed["state"], failed["error"]["code"]) == ("failed", "memory_full")


def test_a_choice_that_grows_together_with_the_prompt_is_counted(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = {"She was un": [5, 6, 7], "She was unhappy": [5, 6, 9], "She was unwell": [5, 6, 7, 8]}
    found: list[list[float]] = []

    async def fused(_service: Service, text: str, *, has_marks: bool) -> list[int]:
        assert not has_marks
        return ids[text]

    def noting(_item: Item, logprobs: list[float]) -> list[float]:
        found.append(logprobs)
        return [1.0, 1.0]

    monkeypatch.setattr(asking, "_ids", fused)
    monkeypatch.setattr(asking, "choice_scores", noting)
    item = {"prompt": "She was un", "choices": ["happy", "well"], "correct": 0}
    assert ended(server, begin(server, [item], ["a"])["id"])["state"] == "done"
    body = {"model": "a", "max_tokens": 0, "echo": True, "logprobs": 1}
    expected = [
        server.client.post("/v1/completions", json=body | {"prompt": ids[text]}).json()["choices"][0]["logprobs"][
            "token_logprobs"
        ][-1]
        for text in ("She was unhappy", "She was unwell")
    ]
    assert found == [pytest.approx(expected)]
    assert max(expected) < 0


def test_an_item_that_cannot_be_asked_fails_the_whole_by_name(server: Running, adapters: list[Path]) -> None:
    too_long = {"prompt": "a" * 600, "answer": "b"}
    failed = ended(server, begin(server, [ITEM, too_long], ["a"])["id"])
    assert (failed["state"], failed["error"]["code"]) == ("failed", "context_length_exceeded")
    assert failed["error"]["message"].startswith("item 2, asked of a@1: ")
    server.put("gone", adapters[1])
    with full(server):
        name = begin(server, [ITEM], ["gone"])["id"]
        assert server.client.delete("/v1/adapters/gone").status_code == 200
    failed = ended(server, name)
    assert (failed["state"], failed["error"]["code"]) == ("failed", "model_not_found")


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"task": '{"prompt": "a"}'}, "invalid_request", "task: line 1: give exactly one of answer"),
        ({"task": [{"prompt": "a"}]}, "invalid_request", "task: task[0]: give exactly one of answer"),
        ({"task": [3]}, "invalid_request", "task[0]: must be an object"),
        ({"task": 3}, "invalid_request", "must be JSONL"),
        ({"task": ""}, "invalid_request", "no item"),
        ({"models": []}, "invalid_request", "models"),
        ({"models": ["nobody"]}, "model_not_found", "no adapter 'nobody'"),
        ({"models": ["a", "side"]}, "model_not_found", "but no alias"),
        ({"models": ["b@9"]}, "version_not_found", "b@9"),
        ({"models": ["b", "b@2"]}, "invalid_request", "models[1] was listed before"),
        ({"models": ["a"] * 9}, "invalid_request", "models"),
        ({"max_tokens": 0}, "invalid_request", "max_tokens"),
        ({"stop": [""]}, "invalid_request", "stop"),
        ({"temperature": 1}, "invalid_request", "temperature"),
        ({"task": [ITEM] * 7000, "models": list(MODELS)}, "invalid_request", "at most 20000 answers"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(
    server: Running, fields: dict[str, Any], code: str, words: str
) -> None:
    server.client.put("/v1/aliases/side", json={"target": "a"})
    before = server.client.get("/v1/evaluations").json()
    answer = server.client.post("/v1/evaluations", json={"task": [ITEM], "models": ["a"]} | fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (404 if code.endswith("not_found") else 400, code)
    assert words in error["message"]
    assert server.client.get("/v1/evaluations").json() == before


def test_so_many_wait_and_so_many_are_kept(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"task": [ITEM], "models": ["a"]}
    with full(server):
        names = [begin(server, [ITEM], ["a"], max_tokens=1)["id"] for _ in range(evaluations.MAX_OPEN)]
        refused = server.client.post("/v1/evaluations", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        unread = server.client.post("/v1/evaluations", content=b"{", headers={"content-type": "application/json"})
        assert unread.status_code == 429  # who has no room has nothing read
    for name in names:
        ended(server, name)
    listed = server.client.get("/v1/evaluations", params={"limit": 2}).json()
    assert ([one["id"] for one in listed["data"]], listed["has_more"]) == (names[:1:-1], True)
    further = server.client.get("/v1/evaluations", params={"limit": 2, "after": names[2]}).json()
    assert [one["id"] for one in further["data"]] == names[1::-1]
    monkeypatch.setattr(evaluations, "MAX_KEPT", 3)
    refused = server.client.post("/v1/evaluations", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_exceeded")


def test_a_mistake_of_the_servers_leaves_no_run_that_seems_to_go_on(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_args: object) -> list[float]:
        raise ZeroDivisionError

    monkeypatch.setattr(running, "scores_of", broken)
    failed = ended(server, begin(server, [ITEM], ["a"])["id"])
    assert (failed["state"], failed["error"]["code"]) == ("failed", "internal_error")
    assert "ZeroDivision" not in json.dumps(failed)


def test_models_take_turns_by_blocks_of_items(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    async def noting(_service: Service, _asking: asking.Asking, model: Evaluated, item: Item) -> list[float]:
        asked.append((model.reference, item.prompt))
        return [1.0, 1.0]

    monkeypatch.setattr(running, "scores_of", noting)
    monkeypatch.setattr(running, "BLOCK_ITEMS", 2)
    items = [{"prompt": prompt, "answer": ""} for prompt in "123"]
    assert ended(server, begin(server, items, ["a", "b@1"])["id"])["progress"] == {"done": 6, "total": 6}
    assert asked == [("a@1", "1"), ("a@1", "2"), ("b@1", "1"), ("b@1", "2"), ("a@1", "3"), ("b@1", "3")]


def test_results_outlive_a_restart_and_one_that_was_cut_says_so(
    base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(base, tmp_path, adapter=(f"a={adapters[4]}",))
    folder = tmp_path / "evaluations"
    monkeypatch.setattr(asking, "LOOK_SECONDS", 3600)
    with serving(config) as first:
        done = ended(first, begin(first, [ITEM], [BASE, "a"], max_tokens=4)["id"])
        with full(first):
            stopped = begin(first, [ITEM], ["a"])["id"]
            killed = begin(first, [ITEM], ["a"])["id"]
            as_it_ran = (folder / f"{killed}.json").read_bytes()
    (folder / f"{killed}.json").write_bytes(as_it_ran)
    (folder / "eval_bad.json").write_bytes(b"{")
    (folder / "eval_half.part").write_bytes(b"{")
    assert json.loads((folder / f"{stopped}.json").read_bytes())["state"] == "interrupted"
    with serving(config) as second:
        assert get(second, done["id"]) == done
        for name in (stopped, killed):
            told = get(second, name)
            assert (told["state"], told["progress"]) == ("interrupted", {"done": 0, "total": 1})
            assert told["error"]["message"] == "the server that ran it ended first; ask for it again"
        assert {one["id"] for one in second.client.get("/v1/evaluations").json()["data"]} == {
            done["id"],
            stopped,
            killed,
        }
        assert not (folder / "eval_half.part").exists()
        begin(second, [ITEM], ["a"])  # nobody waits behind what was cut


def test_a_tenants_are_its_own_and_noted(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    keys = {tenant: create_key(file, tenant, tuple(KeyScope))[0] for tenant in ("acme", "zeta", "default")}
    audit = tmp_path / "audit.jsonl"
    with serving(settings(base, tmp_path / "data", key_file=file, audit_log=audit)) as shared:

        def become(tenant: str) -> None:
            shared.client.headers["authorization"] = f"Bearer {keys[tenant]}"

        for tenant, number in (("acme", 4), ("zeta", 5)):
            become(tenant)
            shared.put("own", adapters[number])
        become("acme")
        told = ended(shared, begin(shared, [ITEM], ["own"], max_tokens=2)["id"])
        assert told["models"][0]["digest"] == shared.client.get("/v1/adapters/own").json()["digest"]
        assert "acme" not in json.dumps(told)
        for tenant in ("zeta", "default"):
            become(tenant)
            assert shared.client.get("/v1/evaluations").json()["data"] == []
            for method, url in (("GET", ""), ("POST", "/cancel"), ("DELETE", "")):
                one, nobodys = (
                    shared.client.request(method, f"/v1/evaluations/{name}{url}") for name in (told["id"], "eval_x")
                )
                assert (one.status_code, one.json()["error"]["code"]) == (404, "not_found")
                assert one.text.replace(told["id"], "eval_x") == nobodys.text
        become("acme")
        shared.client.patch("/v1/adapters/own", json={"shared_with": ["zeta"]})
        become("zeta")
        theirs = ended(shared, begin(shared, [ITEM], ["own", "acme~own"], max_tokens=2)["id"])
        assert theirs["state"] == "done"
        assert theirs["models"][1]["digest"] == told["models"][0]["digest"] != theirs["models"][0]["digest"]
        become("acme")
        assert shared.client.delete(f"/v1/evaluations/{told['id']}").status_code == 200
    noted = [json.loads(line) for line in audit.read_text().splitlines()]
    found = [(one["tenant"], one["change"], one["digest"]) for one in noted if one["name"] == told["id"]]
    digest = told["task"]["digest"]
    assert found == [("acme", "evaluation.create", digest), ("acme", "evaluation.delete", digest)]
