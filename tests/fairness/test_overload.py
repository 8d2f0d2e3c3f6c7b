"""Where there is more to do than can be done: who is let in, who is told to come again, and what is done too late."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from scheduler_harness import make, run_step, submit
from serving import BASE, Running, serving, settings
from swaplora_server.engine.request import Request
from swaplora_server.engine.runner import Runner
from swaplora_server.engine.scheduling import scheduler as scheduler_module
from swaplora_server.engine.scheduling.batch import Batch, Sampled

MAX_WAITING = 3
PEER = "127.0.0.1"
HEADER = "X-Request-Timeout"
GUARD_SECONDS = 60
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": [5, 6, 7]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"input": "hi", "max_output_tokens": 4},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    "/v1/embeddings": {"input": [5, 6, 7]},
}
GENERATES = [path for path in ROUTES if path != "/v1/embeddings"]


@pytest.fixture(scope="module")
def narrow(base: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that runs one at a time and lets three wait; the fifth is beyond that."""
    with serving(settings(base, tmp_path_factory.mktemp("data"), max_num_seqs=1, max_waiting=MAX_WAITING)) as running:
        running.put("sql", adapters[0])
        yield running


def ask(server: Running, path: str = "/v1/completions", timeout: Any = None, **fields: Any) -> httpx.Response:
    headers = {} if timeout is None else {HEADER: str(timeout)}
    body = {"model": BASE, **({} if "max_output_tokens" in ROUTES[path] else {"max_tokens": 4}), **ROUTES[path]}
    if path == "/v1/embeddings":
        del body["max_tokens"]
    return server.client.post(path, json=body | fields, headers=headers)


def error_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.parametrize("path", ROUTES)
def test_where_all_places_are_taken_one_more_is_refused_before_its_text_is_looked_at(
    narrow: Running, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_to_be_asked(*_args: Any, **_options: Any) -> list[int]:
        raise AssertionError("it was looked at")

    monkeypatch.setattr(narrow.service.tokenizer, "encode_all", not_to_be_asked)
    monkeypatch.setattr(narrow.service.chat_template, "render", not_to_be_asked)
    admission = narrow.service.admissions.admit(1 + MAX_WAITING, "", BASE, PEER)
    answer = ask(narrow, path)
    admission.release()
    assert answer.status_code == 429
    assert "overloaded" in answer.text or path == "/v1/messages"
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("path", ROUTES)
def test_where_there_is_room_for_nobody_a_body_is_not_even_read(narrow: Running, path: str) -> None:
    """What cannot be read is a 400 as long as there is room."""
    most = narrow.service.admissions.admit(1 + MAX_WAITING, "", BASE, PEER), narrow.service.admissions.admit(1, "acme")
    assert narrow.client.post(path, content=b"{").status_code == 429
    for admission in most:
        admission.release()
    assert narrow.client.post(path, content=b"{").status_code == 400


def test_counting_tokens_takes_no_place(narrow: Running) -> None:
    most = narrow.service.admissions.admit(1 + MAX_WAITING, "", BASE, PEER), narrow.service.admissions.admit(1, "acme")
    body = {"model": BASE, "messages": [{"role": "user", "content": "hi"}]}
    assert narrow.client.post("/v1/messages/count_tokens", json=body).status_code == 200
    assert narrow.client.post("/tokenize", json=body).status_code == 200
    for admission in most:
        admission.release()


def test_a_flood_of_one_adapter_leaves_a_place_to_another(narrow: Running) -> None:
    admission = narrow.service.admissions.admit(1 + MAX_WAITING, "", "sql", PEER)
    assert error_of(ask(narrow, model="sql")) == (429, "overloaded")
    assert error_of(ask(narrow, model="sql@1")) == (429, "overloaded")
    assert ask(narrow).status_code == 200
    admission.release()


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("given", ["", "soon", "0", "-1", "nan", "inf", "86401", "1,2"])
def test_a_time_limit_that_is_none_is_refused(narrow: Running, path: str, given: str) -> None:
    answer = ask(narrow, path, timeout=given)
    assert answer.status_code == 400
    assert HEADER in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ROUTES)
def test_what_is_done_in_time_is_answered(narrow: Running, path: str) -> None:
    assert ask(narrow, path, timeout=600).status_code == 200


@pytest.mark.parametrize("path", GENERATES)
@pytest.mark.parametrize(("priority", "status"), [(-(2**31), 200), (2**31 - 1, 200), (2**31, 400), ("high", 400)])
def test_a_priority_is_a_number(narrow: Running, path: str, priority: Any, status: int) -> None:
    assert ask(narrow, path, priority=priority).status_code == status


class Steps:
    """What the engine runs; each step waits until it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[Batch] = []
        self.may_go_on = threading.Event()
        run = Runner.run

        def held(runner: Runner, batch: Batch) -> list[Sampled]:
            self.batches.append(batch)
            assert self.may_go_on.wait(GUARD_SECONDS)
            return run(runner, batch)

        monkeypatch.setattr(Runner, "run", held)


def let_time_pass(server: Running) -> None:
    """Have the time be over of whoever has a limit."""
    scheduler = server.service.engine._scheduler  # noqa: SLF001
    for sequence in [*scheduler._running, *scheduler._waiting]:  # noqa: SLF001
        if sequence.request.deadline is not None:
            sequence.request.deadline = 1e-9
    scheduler._next_deadline = 0.0  # noqa: SLF001


def test_one_whose_time_is_over_before_it_begins_is_never_begun(
    narrow: Running, steps: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = narrow.service.engine
    submit_in_time = engine.submit

    def submit_late(request: Request) -> None:
        request.deadline = 1e-9
        submit_in_time(request)

    monkeypatch.setattr(engine, "submit", submit_late)
    answer = ask(narrow, timeout=600)
    assert error_of(answer) == (504, "deadline_exceeded")
    assert answer.headers["x-should-retry"] == "false"
    assert not any(batch.rows for batch in steps)
    assert 'generations_total{outcome="expired"} 1.0' in narrow.client.get("/metrics").text
    narrow.wait_idle()


def test_one_whose_time_is_over_while_it_is_answered_ends_with_an_error(
    narrow: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    steps.may_go_on.set()
    body = {"model": BASE, "prompt": [5, 6, 7], "max_tokens": 480, "ignore_eos": True, "stream": True}
    with narrow.client.stream("POST", "/v1/completions", json=body, headers={HEADER: "600"}) as answer:
        lines = answer.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"]
        steps.may_go_on.clear()
        let_time_pass(narrow)
        steps.may_go_on.set()
        events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "deadline_exceeded"
    assert len(steps.batches) < 480
    narrow.wait_idle()


def test_the_time_of_each_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(scheduler_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    scheduler = make(max_num_seqs=2)
    soon, never, later, waiting = (
        submit(scheduler, [number], max_tokens=50, deadline=deadline)
        for number, deadline in enumerate((11.0, None, 12.0, 11.5))
    )
    seen = []
    for now[0] in (10.5, 11.0, 11.6, 11.9, 12.0):
        run_step(scheduler)
        seen.append([bool(client.events) and client.events[-1].error_code for client in (soon, never, later, waiting)])
    plain, over = "engine_failed", "deadline_exceeded"
    assert seen == [
        [plain, plain, False, False],
        [over, plain, plain, False],
        [over, plain, plain, over],
        [over, plain, plain, over],
        [over, plain, over, over],
    ]
    assert not waiting.events[0].token_id
    assert scheduler.num_failed == 0
