"""The engine's thread: when it fails, hangs or stops, everybody is told and nothing is held."""

import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file

from serving import BASE, Running, serving, settings
from swaplora_adapters.files.naming import WEIGHTS_FILE
from swaplora_server.engine.request import FinishReason, Request, SamplingParams, TokenEvent
from swaplora_server.engine.runner import Runner
from swaplora_server.engine.scheduling.batch import Batch, Sampled
from swaplora_server.watchdog import NUM_LOOKS, Watchdog

PROMPT = list(range(40, 60))
LONG = {"model": BASE, "prompt": PROMPT, "max_tokens": 400, "temperature": 0, "ignore_eos": True}


def fail_from_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the model raise from its `step`th pass on."""
    run, calls = Runner.run, iter(range(1_000_000))

    def failing(self: Runner, batch: Batch) -> list[Sampled]:
        if next(calls) >= step:
            raise ZeroDivisionError("planted")
        return run(self, batch)

    monkeypatch.setattr(Runner, "run", failing)


def test_a_failed_engine_ends_every_stream_and_shows_in_health(
    base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(settings(base, tmp_path, log_level="error")) as server:
        server.put("leased", adapters[0])
        fail_from_step(monkeypatch, 5)
        answer = server.client.post("/v1/completions", json=LONG | {"model": "leased", "stream": True})
        events = [line for line in answer.text.split("\n\n") if line]
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "internal_error"
        assert events[-1] == "data: [DONE]"
        assert "planted" not in answer.text
        while server.service.engine.is_alive:  # which looks whether it can compute anything at all
            time.sleep(0.005)
        assert server.client.get("/health").status_code == 503
        assert server.client.get("/health/ready").status_code == 503
        assert server.client.post("/v1/completions", json=LONG).json()["error"]["code"] == "engine_failed"
        assert server.client.get("/v1/adapters/leased").status_code == 503
        server.service.registry.check_integrity()
        assert server.service.registry.card("leased").num_in_flight == 0


def last_event(answer: httpx.Response) -> tuple[str, str]:
    """The code of the error that ended a stream, and what stands behind it."""
    *_, error, done = [line for line in answer.text.split("\n\n") if line]
    return json.loads(error.removeprefix("data: "))["error"]["code"], done


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_a_step_that_hangs_leaves_nobody_waiting(
    base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what runs, nor what waits for its turn, for memory, or for a delete; nor the stop."""
    run, steps, start = Runner.run, itertools.count(), Watchdog.start
    is_stuck, goes_on, watchdogs = threading.Event(), threading.Event(), list[Watchdog]()

    def hanging(self: Runner, batch: Batch) -> list[Sampled]:
        if next(steps) == 3:
            is_stuck.set()
            assert goes_on.wait(60)
        return run(self, batch)

    monkeypatch.setattr(Runner, "run", hanging)
    monkeypatch.setattr(Watchdog, "start", lambda self: watchdogs.append(self))
    room = max(sum(tensor.nbytes for tensor in load_file(folder / WEIGHTS_FILE).values()) for folder in adapters[:2])
    config = settings(base, tmp_path, adapter_memory_bytes=room, max_step_seconds=0.2, log_level="error")
    with serving(config) as server, ThreadPoolExecutor() as pool:
        post, service = server.client.post, server.service
        for name, folder in zip(("held", "wanted"), adapters, strict=False):
            assert server.put(name, folder).status_code == 201
        stream = pool.submit(post, "/v1/completions", json=LONG | {"model": "held", "stream": True, "n": 2})
        assert is_stuck.wait(60)
        whole, wanting = (
            pool.submit(post, "/v1/completions", json=LONG | {"model": name}) for name in (BASE, "wanted")
        )
        delete = pool.submit(server.client.delete, "/v1/adapters/held?timeout=600")
        while service.registry.card("wanted").state != "loading" or "held" in service.registry.names.index:
            time.sleep(0.005)
        while service.admissions.num_sequences < 4:
            time.sleep(0.005)
        assert server.client.get("/health").status_code == 200
        start(watchdogs[0])
        assert last_event(stream.result(60)) == ("engine_failed", "data: [DONE]")
        assert code_of(whole.result(60)) == code_of(wanting.result(60)) == (503, "engine_failed")
        assert delete.result(60).json()["state"] == "deleted"
        assert server.client.get("/health").status_code == 503
        assert "stuck" in post("/v1/completions", json=LONG).json()["error"]["message"]
        service.engine.stop(0.01)
        assert not service.has_ended
        goes_on.set()  # and then the thread gives back what is its own, and nothing for a second time


@pytest.mark.parametrize("num_repeats", [NUM_LOOKS, NUM_LOOKS + 1])
def test_only_a_thread_that_beats_no_more_is_stuck(num_repeats: int) -> None:
    """And not one that is slow, of which every look but the last is in vain, time and again."""
    told: list[str] = []
    beats = iter([beat for beat in range(5) for _ in range(num_repeats)])
    has_ended = threading.Event()

    def beat() -> float:
        for one in beats:
            return one
        watchdog.stop()
        has_ended.set()
        return 5

    def on_stuck() -> None:
        told.append("stuck")
        has_ended.set()

    watchdog = Watchdog(beat, 0, on_stuck)
    watchdog.start()
    assert has_ended.wait(60)
    assert told == ["stuck"] * (num_repeats > NUM_LOOKS)


def test_each_end_counts_once_whoever_is_first() -> None:
    """The engine comes round while it is given up: each sequence ends once, and the request is released once."""
    both = threading.Barrier(2)
    for _ in range(50):
        ended: list[TokenEvent] = []
        released: list[bool] = []
        request = Request("raced", (1, 2), SamplingParams(3), ended.append, num_sequences=16)
        request.release = partial(released.append, True)

        def finish_all(request: Request = request) -> None:
            both.wait(60)
            for index in reversed(range(16)):
                request.finish(TokenEvent(index, finish_reason=FinishReason.STOP))

        thread = threading.Thread(target=finish_all)
        thread.start()
        both.wait(60)
        request.give_up("given up", "engine_failed")
        thread.join(60)
        assert sorted(event.index for event in ended) == list(range(16))
        assert (released, request.num_unfinished) == ([True], 0)


def test_what_is_submitted_to_a_stopped_engine_ends_at_once(base: Path, tmp_path: Path) -> None:
    with serving(settings(base, tmp_path)) as server:
        engine = server.service.engine
        engine.stop()
        events: list[TokenEvent] = []
        released: list[bool] = []
        engine.submit(
            Request(
                "late",
                (1, 2),
                SamplingParams(max_tokens=3),
                emit=events.append,
                num_sequences=2,
                release=lambda: released.append(True),
            )
        )
        assert [event.index for event in events] == [0, 1]
        assert {event.finish_reason for event in events} == {FinishReason.ERROR}
        assert released == [True]


def test_stopping_ends_running_requests_with_an_error(server: Running) -> None:
    answers: list[int] = []
    thread = threading.Thread(
        target=lambda: answers.append(server.client.post("/v1/completions", json=LONG).status_code)
    )
    thread.start()
    while not server.service.engine.snapshot().num_running:
        time.sleep(0.005)
    server.service.engine.stop()
    thread.join(60)
    assert answers == [503]


def test_a_silent_stream_is_kept_alive(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swaplora_server.http.sse.PING_SECONDS", 0.05)
    run = Runner.run

    def slowly(self: Runner, batch: Batch) -> list[Sampled]:
        time.sleep(0.3)
        return run(self, batch)

    monkeypatch.setattr(Runner, "run", slowly)
    with serving(settings(base, tmp_path)) as server:
        answer = server.client.post("/v1/completions", json=LONG | {"max_tokens": 2, "stream": True})
        lines = [line for line in answer.text.split("\n\n") if line]
        assert lines.count(": ping") >= 4
        assert lines[-1] == "data: [DONE]"


def test_a_folder_that_does_not_apply_is_left_out_and_the_rest_served(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"
    for name in ("good", "broken"):
        (folder / name).mkdir(parents=True)
        for part in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / name / part).write_bytes((adapters[0] / part).read_bytes())
    (folder / "broken" / "adapter_model.safetensors").write_bytes(b"not a tensor file")
    with serving(settings(base, tmp_path / "data", adapter_dir=folder, log_level="error")) as server:
        assert [card["name"] for card in server.client.get("/v1/adapters").json()["data"]] == ["good"]
