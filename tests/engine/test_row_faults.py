"""One request makes something fail: it ends alone, its neighbours' tokens and logprobs are what they are without it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from repository import KERNEL_CACHE
from swaplora_adapters.weights.served import AdapterWeights, ModuleWeights
from swaplora_server.base.base_model import BaseModel, load_base
from swaplora_server.engine import request as requests
from swaplora_server.engine import step
from swaplora_server.engine.engine import Engine
from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.request import AdapterUse, FinishReason, Request, SamplingParams, Sequence, TokenEvent
from swaplora_server.engine.row_faults import run_bisecting
from swaplora_server.engine.runner import Runner
from swaplora_server.engine.sampling import masks, sampler
from swaplora_server.engine.scheduling import scheduler
from swaplora_server.engine.scheduling.batch import Batch, Sampled, ScheduledRows, rows_of
from swaplora_server.engine.scheduling.scheduler import Scheduler
from swaplora_server.engine.step import Planner
from swaplora_server.kernels.cpu.backend import CpuBackend
from swaplora_server.kernels.cpu.lora import CpuLora
from swaplora_server.kernels.pick import pick_backend
from swaplora_server.kernels.step import Segments, StepPlan

CPU = torch.device("cpu")
CACHE = KERNEL_CACHE
NUM_BLOCKS, BLOCK_SIZE = 200, 16
CULPRIT = 3
NUM_REQUESTS = 9


class PlantedError(Exception):
    """Raised by what a test has broken."""


@dataclass
class Asker:
    """One request and all that it was told."""

    request: Request
    events: list[TokenEvent] = field(default_factory=list)
    num_released: int = 0
    has_ended: Event = field(default_factory=Event)

    def hear(self, event: TokenEvent) -> None:
        self.events.append(event)
        if not self.request.num_unfinished:
            self.has_ended.set()

    def released(self) -> None:
        self.num_released += 1

    @property
    def said(self) -> list[list[tuple[int | None, object]]]:
        """What was generated for each of its choices, to the last bit of the logprobs."""
        return [
            [
                (event.token_id, event.logprobs)
                for event in self.events
                if event.index == index and event.token_id is not None
            ]
            for index in range(self.request.num_sequences)
        ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tiny.save_tiny_base(tmp_path_factory.mktemp("base"))
    backend = pick_backend(CPU, torch.float32, CACHE, lambda _message: None)
    return load_base(folder, device=CPU, dtype=torch.float32, backend=backend)


def adapter(model: BaseModel, seed: int) -> AdapterUse:
    generator = torch.Generator().manual_seed(seed)
    modules = {
        path: ModuleWeights(
            torch.randn(4, shape.in_features, generator=generator) / shape.in_features**0.5,
            (torch.randn(4, shape.out_features, generator=generator) * 0.1).t(),
        )
        for path, shape in model.layers.linears.items()
    }
    return AdapterUse(model.prepared(AdapterWeights(f"sha256:{seed}", modules)), 1.0, f"sha256:{seed}")


def askers(model: BaseModel) -> list[Asker]:
    """Rows of the base and of adapters, greedy and drawn, of short and of long prompts; each with two choices."""
    made: list[Asker] = []
    for number in range(NUM_REQUESTS):
        params = SamplingParams(12, temperature=float(number % 2), top_p=0.9, seed=number, num_logprobs=3)
        prompt = tuple(number + position for position in range(8 + 9 * number))
        uses = (adapter(model, number),) if number % 3 == 0 else ()
        request = Request(str(number), prompt, params, lambda _event: None, uses, num_sequences=2)
        made.append(Asker(request))
        request.emit, request.release = made[-1].hear, made[-1].released
    return made


def engine_of(model: BaseModel) -> Engine:
    pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
    limits: dict[str, Any] = {"max_batch_tokens": 64, "max_num_seqs": 32, "max_step_ranks": 4096}
    return Engine(Scheduler(pool, prefix_cache=True, **limits), model.runner(NUM_BLOCKS, BLOCK_SIZE))


def run_to_the_end(model: BaseModel, asked: list[Asker]) -> Engine:
    """Submit all before the first step, so that they share steps, and wait until each has ended."""
    engine = engine_of(model)
    for asker in asked:
        engine.submit(asker.request)
    engine.start()
    for asker in asked:
        assert asker.has_ended.wait(60)
    return engine


@pytest.fixture(scope="module")
def undisturbed(model: BaseModel) -> list[Asker]:
    """Two runs without a fault, which agree."""
    first, second = askers(model), askers(model)
    for asked in (first, second):
        run_to_the_end(model, asked).stop()
    assert [asker.said for asker in first] == [asker.said for asker in second]
    assert all([len(choice) for choice in asker.said] == [12, 12] for asker in first)
    return first


def is_culprit(request: Request) -> bool:
    return request.request_id == str(CULPRIT)


def in_choosing(patch: pytest.MonkeyPatch, after: int) -> None:
    """Where it is asked what one sequence allows next."""
    allowed = masks.AllowedTokens.of

    def failing(self: masks.AllowedTokens, sequence: Sequence, vocab_size: int) -> Any:
        if is_culprit(sequence.request) and sequence.num_generated >= after:
            raise PlantedError
        return allowed(self, sequence, vocab_size)

    patch.setattr(masks.AllowedTokens, "of", failing)


def in_the_sampler(patch: pytest.MonkeyPatch, after: int) -> None:
    sample = sampler.Sampler.sample

    def failing(self: sampler.Sampler, logits: Tensor, sequences: Any) -> list[Sampled]:
        if any(is_culprit(sequence.request) and sequence.num_generated >= after for sequence in sequences):
            raise PlantedError
        return sample(self, logits, sequences)

    patch.setattr(sampler.Sampler, "sample", failing)


def in_the_plan(patch: pytest.MonkeyPatch, after: int) -> None:
    """Where a step's blocks are laid out: the culprit has lost one."""
    prompt = 8 + 9 * CULPRIT
    plan = Planner.plan

    def broken(rows: ScheduledRows) -> bool:
        return is_culprit(rows.sequence.request) and rows.stop >= prompt + after

    def failing(self: Planner, scheduled: Any) -> StepPlan:
        for rows in filter(broken, scheduled):
            lost = rows.sequence.block_table.pop()
            try:
                return plan(self, scheduled)
            finally:
                rows.sequence.block_table.append(lost)
        return plan(self, scheduled)

    patch.setattr(Planner, "plan", failing)


def in_the_lora_kernel(patch: pytest.MonkeyPatch, after: int) -> None:
    """Where the head is about to use the culprit's factors, at the end of a forward that has written keys already."""
    lora = CpuBackend.lora
    uses = iter(range(1_000_000))

    class _Exploding(CpuLora):
        def add(self, x: Tensor, outputs: Any) -> None:
            if next(uses) >= after:
                raise PlantedError
            super().add(x, outputs)

    def failing(self: CpuBackend, segments: Segments) -> CpuLora:
        if any(weights.digest == f"sha256:{CULPRIT}" for weights in segments.adapters):
            return _Exploding(self.library, segments, self.dtype)
        return lora(self, segments)

    patch.setattr(CpuBackend, "lora", failing)


def in_the_digest_check(patch: pytest.MonkeyPatch, after: int) -> None:
    check = step.checked_weights

    def failing(use: AdapterUse) -> AdapterWeights:
        return check(replace(use, digest="sha256:other") if use.digest == f"sha256:{CULPRIT}" else use)

    patch.setattr(step, "checked_weights", failing)


def in_the_prefix_cache(patch: pytest.MonkeyPatch, after: int) -> None:
    block_parent = Request.block_parent

    def failing(self: Request, parent: bytes, start: int, stop: int) -> bytes:
        if is_culprit(self) and start >= BLOCK_SIZE * (after // 4):
            raise PlantedError
        return block_parent(self, parent, start, stop)

    patch.setattr(Request, "block_parent", failing)


def in_what_ends_it(patch: pytest.MonkeyPatch, after: int) -> None:
    finish_reason_after = Sequence.finish_reason_after

    def failing(self: Sequence, token_id: int) -> FinishReason | None:
        if is_culprit(self.request) and self.num_generated >= after:
            raise PlantedError
        return finish_reason_after(self, token_id)

    patch.setattr(Sequence, "finish_reason_after", failing)


FAULTS: list[Callable[[pytest.MonkeyPatch, int], None]] = [
    in_choosing,
    in_the_sampler,
    in_the_plan,
    in_the_lora_kernel,
    in_the_digest_check,
    in_the_prefix_cache,
    in_what_ends_it,
]


def quiet(patch: pytest.MonkeyPatch) -> None:
    """The faults' tracebacks are not of interest."""
    for module in (scheduler, requests):
        for level in ("error", "exception"):
            patch.setattr(f"{module.__name__}._log.{level}", lambda *_args, **_fields: None)


@pytest.mark.parametrize("after", [0, 5])
@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_failing_row_ends_its_request_alone(
    model: BaseModel,
    undisturbed: list[Asker],
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[pytest.MonkeyPatch, int], None],
    after: int,
) -> None:
    quiet(monkeypatch)
    plant(monkeypatch, after)
    asked = askers(model)
    engine = run_to_the_end(model, asked)
    culprit = asked.pop(CULPRIT)
    assert [event.finish_reason for event in culprit.events[-2:]] == [FinishReason.ERROR] * 2
    assert {event.error_code for event in culprit.events[-2:]} == {"internal_error"}
    assert "Planted" not in culprit.events[-1].error
    assert culprit.num_released == 1
    expected = [asker for number, asker in enumerate(undisturbed) if number != CULPRIT]
    assert [asker.said for asker in asked] == [asker.said for asker in expected]
    assert [asker.num_released for asker in asked] == [1] * len(asked)
    assert engine.snapshot().num_failed_requests == 1
    assert engine.is_alive
    again = askers(model)[0]
    engine.submit(again.request)
    assert again.has_ended.wait(60)
    assert again.said == undisturbed[0].said
    engine.stop()
    assert engine.failure is None
    assert engine.snapshot().is_at_rest


@pytest.mark.parametrize("told", ["emit", "release"])
def test_a_client_that_cannot_be_told_costs_nobody_else(
    model: BaseModel, undisturbed: list[Asker], monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    quiet(monkeypatch)
    asked = askers(model)
    culprit = asked.pop(CULPRIT)

    def failing(*_event: TokenEvent) -> None:
        raise PlantedError

    setattr(culprit.request, told, failing)
    engine = engine_of(model)
    for asker in [*asked, culprit]:
        engine.submit(asker.request)
    engine.start()
    for asker in asked:
        assert asker.has_ended.wait(60)
    expected = [asker for number, asker in enumerate(undisturbed) if number != CULPRIT]
    assert [asker.said for asker in asked] == [asker.said for asker in expected]
    engine.stop()
    assert engine.failure is None
    assert engine.snapshot().is_at_rest
    assert culprit.request.num_unfinished == 0


def test_a_fault_that_passes_costs_nobody(
    model: BaseModel, undisturbed: list[Asker], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, steps = Runner.logits, iter(range(1_000_000))

    def failing(self: Runner, batch: Batch) -> Tensor:
        if next(steps) == 4:
            raise PlantedError
        return run(self, batch)

    monkeypatch.setattr(Runner, "logits", failing)
    asked = askers(model)
    engine = run_to_the_end(model, asked)
    assert [asker.said for asker in asked] == [asker.said for asker in undisturbed]
    assert engine.snapshot().num_failed_requests == 0
    engine.stop()


def test_a_model_that_computes_nothing_any_more_ends_the_engine(
    model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(monkeypatch)
    monkeypatch.setattr("swaplora_server.engine.engine._log.exception", lambda *_args, **_fields: None)
    run, steps = Runner.logits, iter(range(1_000_000))

    def failing(self: Runner, batch: Batch) -> Tensor:
        if next(steps) >= 4:
            raise PlantedError
        return run(self, batch)

    monkeypatch.setattr(Runner, "logits", failing)
    asked = askers(model)
    engine = run_to_the_end(model, asked)
    engine.stop()
    assert engine.failure is not None
    assert [asker.num_released for asker in asked] == [1] * NUM_REQUESTS


@pytest.mark.parametrize("culprits", [{2}, {0, 7}, {1, 2, 3}, set(range(8)), set()])
def test_a_step_is_run_without_those_that_make_it_fail(culprits: set[int]) -> None:
    """And in few runs: each culprit costs at most two a halving."""
    made = [Request(str(n), (n,), SamplingParams(1), lambda _event: None, num_sequences=2) for n in range(8)]
    sequences = [Sequence(request, index) for index in range(2) for request in made]
    batch = Batch(tuple(rows_of(sequence, 0, 1) for sequence in sequences))
    calls: list[Batch] = []

    def run(part: Batch) -> list[Sampled]:
        calls.append(part)
        if any(int(rows.sequence.request.request_id) in culprits for rows in part.rows):
            raise PlantedError
        return [Sampled(int(sequence.request.request_id)) for sequence in part.sampling]

    output = run_bisecting(run, batch)
    assert {int(request.request_id) for request in output.failed} == culprits
    assert [sampled.token_id for sampled in output.sampled] == [
        int(sequence.request.request_id) for sequence in output.batch.sampling
    ]
    ran = {int(rows.sequence.request.request_id) for rows in output.batch.rows}
    assert (ran, len(output.batch.rows)) == (set(range(8)) - culprits, 2 * (8 - len(culprits)))
    assert len(calls) <= 1 + 2 * 3 * len(culprits)
