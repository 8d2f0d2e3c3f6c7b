"""The engine's thread: when it fails or stops, everybody is told and nothing is held."""

import json
import threading
import time
from pathlib import Path

import pytest

from serving import BASE, Running, serving, settings
from swaplora_server.engine.request import FinishReason, Request, SamplingParams, TokenEvent
from swaplora_server.engine.runner import Runner
from swaplora_server.engine.scheduler import Batch, Sampled

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
