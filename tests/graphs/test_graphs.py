"""Decoding steps that are recorded once say what those launched one by one do, whatever comes into their buckets."""

import io
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from structlog.testing import capture_logs
from torch import Tensor

import plain_kernels
import tape
import tiny
from gpu_checks import graphs, steps
from gpu_checks.card import Card
from gpu_checks.report import Report
from swaplora_adapters.weights.router import Prototypes, Route, Router
from swaplora_adapters.weights.served import AdapterWeights, EmbeddingWeights, ModuleWeights
from swaplora_server.base import decode_graphs
from swaplora_server.base.base_model import BaseModel, load_base
from swaplora_server.base.decode_graphs import record_steps
from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.request import AdapterUse, Request, SamplingParams
from swaplora_server.engine.request import Sequence as Tokens
from swaplora_server.engine.runner import Runner
from swaplora_server.engine.scheduling.batch import Batch, rows_of
from swaplora_server.engine.scheduling.scheduler import Scheduler
from swaplora_server.kernels.cuda import attention, lora
from swaplora_server.kernels.cuda.attention import CudaStep
from swaplora_server.kernels.cuda.attention_runs import prefill_tiles
from swaplora_server.kernels.cuda.backend import CudaBackend
from swaplora_server.kernels.cuda.graphs import decoding
from swaplora_server.kernels.cuda.graphs.buckets import bucket_sizes
from swaplora_server.kernels.cuda.words import Words
from swaplora_server.kernels.pick import torch_backend
from swaplora_server.kernels.step import Runs, Segments, StepForm

CPU = torch.device("cpu")
BLOCK, NUM_BLOCKS, MAX_ROWS = 4, 80, 10
Uses = tuple[AdapterUse, ...]


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tiny.save_tiny_base(tmp_path_factory.mktemp("base"), {**tiny.LLAMA, "num_hidden_layers": 1})
    return load_base(folder, device=CPU, dtype=torch.float32, backend=torch_backend(CPU))


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> list[Words]:
    """All that were made."""
    made: list[Words] = []
    zeros = Words.zeros

    def noted(num_words: int, device: torch.device) -> Words:
        made.append(zeros(num_words, device))
        return made[-1]

    monkeypatch.setattr(Words, "zeros", noted)
    return made


@pytest.fixture
def base(proven: BaseModel, words: list[Words], monkeypatch: pytest.MonkeyPatch) -> BaseModel:
    """On the GPU's backend, its kernels plain ones, its graphs tapes; after each replay no word is what it was."""
    plain_kernels.put_in_place(monkeypatch)
    record = tape.TapeRecorder.record

    def poisoned(self: tape.TapeRecorder, run: Callable[[], None]) -> Callable[[], None]:
        replay = record(self, run)

        def replay_once() -> None:
            replay()
            for each in words:
                tape.poison(each.on_device)
                each.writable()[:] = -(1 << 40)

        return replay_once

    monkeypatch.setattr(tape.TapeRecorder, "record", poisoned)
    return replace(proven, backend=CudaBackend(CPU, torch.float32, tape.TapeRecorder))


class Rows:
    """Sequences that decode, their prompts computed, in a runner of their own."""

    def __init__(self, base: BaseModel, count: int = MAX_ROWS) -> None:
        self.base = base
        self.pool = BlockPool(NUM_BLOCKS, BLOCK)
        self.runner = base.runner(NUM_BLOCKS, BLOCK)
        self.prompts = [tuple((5 * row + 3 * at) % 250 for at in range(2 + 3 * row % 7)) for row in range(count)]
        self.tables: list[list[int]] = [[] for _ in self.prompts]
        for prompt, table in zip(self.prompts, self.tables, strict=True):
            self.pool.grow(table, len(prompt))
            sequence = self.sequence(prompt, table, ())
            self.runner.logits(Batch((rows_of(sequence, 0, len(prompt) - 1),)))

    def batch(self, uses: Sequence[Uses]) -> Batch:
        """The newest token of as many."""
        of_rows = zip(self.prompts, self.tables, uses, strict=False)
        return Batch(tuple(rows_of(self.sequence(*own), len(own[0]) - 1, len(own[0])) for own in of_rows))

    @staticmethod
    def sequence(prompt: tuple[int, ...], table: list[int], uses: Uses) -> Tokens:
        asked = SamplingParams(9, temperature=0)
        sequence = Tokens(Request("row", prompt, asked, lambda _: None, adapters=uses), 0)
        sequence.block_table = table
        return sequence


def adapter(base: BaseModel, seed: int, rank: int = 3, *, is_scaled: bool = False, digest: str = "") -> AdapterWeights:
    """On every linear."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random) * 0.3

    modules = {
        path: ModuleWeights(
            draw(rank, shape.in_features),
            draw(rank, shape.out_features).t(),
            1 + draw(shape.out_features) if is_scaled else None,
            draw(shape.out_features) if is_scaled else None,
        )
        for path, shape in base.layers.linears.items()
    }
    return base.prepared(AdapterWeights(digest or f"sha256:{seed}", modules))


def use(weights: AdapterWeights, scale: float = 1.0) -> Uses:
    return (AdapterUse(weights, scale, weights.digest),)


def assert_replayed(runner: Runner, batch: Batch) -> Tensor:
    """As launched one by one; returns the logits."""
    expected = runner.logits(batch)
    outputs = runner.replayed(batch)
    assert outputs is not None
    torch.testing.assert_close(outputs.logits, expected, atol=1e-5, rtol=1e-5)
    assert outputs.greedy.token_ids.tolist() == expected.argmax(-1).tolist()
    assert outputs.greedy.is_finite.all()
    return outputs.logits.clone()


def test_any_number_of_rows_with_any_adapters_is_what_it_is_launched_one_by_one(base: BaseModel) -> None:
    """Recorded with no adapter at all; several steps after one another in one bucket and in others."""
    rows = Rows(base)
    assert rows.runner.record(bucket_sizes(MAX_ROWS)) == 2 * 5
    adapters = [adapter(base, seed, 1 + 5 * seed, is_scaled=seed % 2 == 1) for seed in range(MAX_ROWS)]
    for count in (10, 3, 1, 2, 9, 5, 4, 8):
        seen = [
            assert_replayed(rows.runner, rows.batch(uses[:count]))
            for uses in (
                [use(each, 0.5 + number) for number, each in enumerate(adapters)],
                [()] * MAX_ROWS,
                [use(adapters[3])] * MAX_ROWS,
                [() if row % 2 else use(adapters[row]) + use(adapters[0], -0.5) for row in range(MAX_ROWS)],
            )
        ]
        assert all(not torch.allclose(seen[1], others, atol=1e-2) for others in (seen[0], seen[2], seen[3]))


def test_an_adapter_that_came_in_place_of_another_is_the_one_that_is_read(base: BaseModel) -> None:
    """By the same name in the same rows, after the first has left memory and something else is where it was."""
    rows = Rows(base, 3)
    rows.runner.record([1, 2, 4])
    first, second = (adapter(base, seed, digest="sha256:same") for seed in (1, 2))
    before = assert_replayed(rows.runner, rows.batch([use(first)] * 3))
    rows.runner.forget_adapters()
    for tensor in first.tensors:
        tensor.fill_(float("nan"))
    after = assert_replayed(rows.runner, rows.batch([use(second)] * 3))
    assert not torch.allclose(before, after, atol=1e-2)


def test_nothing_keeps_an_adapter_alive_once_it_is_forgotten(base: BaseModel) -> None:
    rows = Rows(base, 3)
    rows.runner.record([4])
    weights = adapter(base, 1)
    assert_replayed(rows.runner, rows.batch([use(weights)] * 3))
    tables = weakref.ref(weights)
    rows.runner.forget_adapters()
    del weights
    assert tables() is None


def test_recording_and_rows_that_pad_a_bucket_write_no_keys(base: BaseModel) -> None:
    rows = Rows(base, 3)
    batch = rows.batch([()] * 3)
    rows.runner.logits(batch)

    def kept() -> Tensor:
        layers = rows.runner._kv._layers  # type: ignore[attr-defined]  # noqa: SLF001 - it shows nowhere else
        return torch.stack([cache for layer in layers.values() for cache in layer]).nan_to_num(7)

    before = kept()
    rows.runner.record([8])
    assert torch.equal(kept(), before)
    assert_replayed(rows.runner, batch)
    torch.testing.assert_close(kept(), before)


def without_modules(**others: Any) -> AdapterWeights:
    return AdapterWeights("sha256:other", {}, **others)


def mixed(base: BaseModel) -> tuple[AdapterUse, ...]:
    """A mixture of two adapters, of which each row takes one."""
    members = [use(adapter(base, seed, 3))[0] for seed in range(2)]
    router = Router(tuple(Prototypes(one.weights, base.paths) for one in members), 1, 1.0)
    return tuple(replace(one, route=Route(router, number)) for number, one in enumerate(members))


def test_a_device_that_a_recording_breaks_is_no_warning(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it computes, steps are launched one by one; else the start ends, and says with what to start again."""
    rows = Rows(base, 2)

    def broken(_sizes: Sequence[int]) -> int:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(rows.runner, "record", broken)
    assert record_steps(base, rows.runner, BlockPool(NUM_BLOCKS, BLOCK), 2) is None
    monkeypatch.setattr(decode_graphs, "fault_of", lambda _device: "an illegal memory access")
    with pytest.raises(UnsupportedModelError, match=r"an illegal memory access.*--no-cuda-graphs"):
        record_steps(base, rows.runner, BlockPool(NUM_BLOCKS, BLOCK), 2)


def test_steps_that_no_graph_serves_are_launched_one_by_one_and_counted(base: BaseModel) -> None:
    rows = Rows(base, 5)
    rows.runner.record([1, 2, 4])
    (embedding,) = base.layers.embeddings
    norm = next(iter(base.layers.others))
    own_norm = base.layers.rebuild(norm, {"weight": torch.ones(32) * 2})
    embedding_lora = EmbeddingWeights(torch.ones(259, 1), torch.ones(32, 1))
    whole = Rows.sequence(rows.prompts[1], rows.tables[1], ())
    many = tuple(part for number in range(9) for part in use(adapter(base, number, 200)))
    batches = {
        StepForm.GRAPH: [rows.batch([()] * 3)],
        StepForm.PROMPT: [
            Batch((rows_of(whole, 0, 5),)),
            Batch((rows_of(whole, 0, 1), *rows.batch([()]).rows)),
        ],
        StepForm.ADAPTER: [
            rows.batch([(), use(base.prepared(without_modules(replaced={norm: own_norm})))]),
            rows.batch([use(base.prepared(without_modules(embeddings={embedding: embedding_lora})))]),
            rows.batch([(), mixed(base)]),
        ],
        StepForm.ROOM: [rows.batch([()] * 5), rows.batch([many])],
    }
    for form, of_form in batches.items():
        for batch in of_form:
            logits = rows.runner.logits(batch)
            if form is not StepForm.GRAPH:
                assert rows.runner.replayed(batch) is None
            said = rows.runner.run(batch)
            assert [each.token_id for each in said] == logits[: len(batch.sampling)].argmax(-1).tolist()
        assert rows.runner.num_steps[form] == len(of_form)
    assert rows.runner.num_steps[StepForm.PLAIN] == 0
    scored = rows.batch([()]).rows[0]._replace(num_scored=1, scored_stop=1)
    assert rows.runner.replayed(Batch((scored,))) is None


def test_a_step_that_is_launched_one_by_one_is_told_in_one_copy(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its prompts are cut into too, once a layer has asked for that; and it says what it did before."""
    rows = Rows(base, 4)
    batch = rows.batch([()] * 2)
    for prompt, table in list(zip(rows.prompts, rows.tables, strict=True))[2:]:
        batch = Batch((*batch.rows, rows_of(rows.sequence(prompt, table, ()), 1, len(prompt))))
    rows.runner._kv.tile_shapes.clear()  # type: ignore[attr-defined]  # noqa: SLF001
    expected = rows.runner.logits(batch)
    sent: list[Words] = []
    send = Words.send

    def noted(self: Words, count: int | None = None) -> None:
        sent.append(self)
        send(self, count)

    def cut_before_it_is_sent(*given: Any) -> Any:
        assert not sent
        return prefill_tiles(*given)

    monkeypatch.setattr(Words, "send", noted)
    monkeypatch.setattr(attention, "prefill_tiles", cut_before_it_is_sent)
    assert torch.equal(rows.runner.logits(batch), expected)
    assert len(sent) == 1


def test_without_graphs_all_steps_are_plain(proven: BaseModel) -> None:
    rows = Rows(proven, 2)
    assert rows.runner.record([1, 2]) == 0
    rows.runner.run(rows.batch([()] * 2))
    assert rows.runner.num_steps[StepForm.PLAIN] == 1


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "num_logprobs": 3},
    {"seed": 3},
    {"seed": 4, "temperature": 0.7, "top_p": 0.9, "num_logprobs": 1},
    {"seed": 5, "top_k": 4, "min_p": 0.05},
    {"temperature": 0.0, "logit_bias": ((7, 50.0),)},
    {"temperature": 0.0, "repetition_penalty": 1.5, "presence_penalty": 1.0},
]


def generated(base: BaseModel, sizes: Sequence[int], uses: Sequence[Uses]) -> tuple[list[Any], dict[StepForm, int]]:
    """What sequences that come one by one are given, all kinds of sampling among them."""
    scheduler = Scheduler(
        BlockPool(NUM_BLOCKS, BLOCK), max_batch_tokens=16, max_num_seqs=6, max_step_ranks=999, prefix_cache=True
    )
    runner = base.runner(NUM_BLOCKS, BLOCK)
    if sizes:
        runner.record(sizes)
    events: list[list[Any]] = []
    for number, params in enumerate(SAMPLED * 2):
        told: list[Any] = []
        events.append(told)
        prompt = tuple((3 * number + at) % 250 for at in range(1 + 2 * number))
        asked = SamplingParams(max_tokens=9 + number % 4, **params)
        request = Request(str(number), prompt, asked, told.append, adapters=uses[number % len(uses)])
        scheduler.add(request)
    while scheduler.has_work:
        batch = scheduler.schedule()
        scheduler.commit(batch, runner.run(batch))
    scheduler.check_integrity()
    tokens = [[event.token_id for event in told] for told in events]
    return tokens, runner.num_steps


def test_what_is_generated_is_the_same(base: BaseModel) -> None:
    """Sequences begin, end and are cut among others; every step that can be is replayed."""
    uses = [(), use(adapter(base, 1, 20)), use(adapter(base, 2, is_scaled=True)), use(adapter(base, 3), 0.5)]
    plain, counted = generated(base, (), uses)
    replayed, forms = generated(base, bucket_sizes(6), uses)
    assert replayed == plain
    assert counted[StepForm.PLAIN] == sum(forms.values())
    assert forms[StepForm.GRAPH] > 5
    assert forms[StepForm.PROMPT] > 3
    assert forms[StepForm.GRAPH] + forms[StepForm.PROMPT] == sum(forms.values())


def test_what_was_recorded_is_proven_and_told(base: BaseModel) -> None:
    runner, pool = base.runner(NUM_BLOCKS, BLOCK), BlockPool(NUM_BLOCKS, BLOCK)
    with capture_logs() as logs:
        recorded = record_steps(base, runner, pool, 9)
    assert recorded is not None
    assert recorded.num_graphs == 2 * 5
    (line,) = logs
    assert (line["log_level"], line["graphs"], line["bytes"]) == ("info", 10, 0)
    assert pool.num_free == NUM_BLOCKS
    pool.check_integrity([])
    assert not any(runner.num_steps.values())


def test_a_small_cache_records_what_fits(base: BaseModel) -> None:
    for num_blocks, num_graphs in ((1, 2), (4, 4)):
        recorded = record_steps(base, base.runner(num_blocks, BLOCK), BlockPool(num_blocks, BLOCK), 9)
        assert recorded is not None
        assert recorded.num_graphs == num_graphs


FAULTS = (
    "the ids of the step before",
    "keys of rows that pad",
    "an adapter's first table",
    "as many tiles as were recorded",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_base_whose_graphs_say_something_else_is_served_without_and_says_so(
    base: BaseModel, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _plant(fault, monkeypatch)
    runner, pool = base.runner(NUM_BLOCKS, BLOCK), BlockPool(NUM_BLOCKS, BLOCK)
    with capture_logs() as logs:
        assert record_steps(base, runner, pool, 4) is None
    (line,) = logs
    assert line["log_level"] == "warning"
    assert "launched one operation at a time" in line["event"]
    assert "recorded rows with" in line["reason"]
    assert "standard deviations" in line["reason"]
    assert pool.num_free == NUM_BLOCKS
    rows = Rows(base, 2)
    assert runner.replayed(rows.batch([()] * 2)) is None


def _plant(fault: str, patch: pytest.MonkeyPatch) -> None:
    bucket = decoding._Bucket  # noqa: SLF001
    hold, write, plan_of = bucket.hold, CudaStep.write, lora.planned

    def late(self: Any, plan: Any, planned: Any) -> None:
        shown = self._words.on_device[: self._layout.rows].clone()
        hold(self, plan, planned)
        self._words.on_device[: self._layout.rows] = shown.clamp(min=0)

    def all_written(self: CudaStep, runs: Runs) -> None:
        write(self, runs)
        self._words.writable()[1 : 1 + self.room.slots] = BLOCK

    def never_again(segments: Segments, dtype: torch.dtype) -> lora.PlannedLora:
        plan = plan_of(segments, dtype)
        if len(segments):
            first.append(plan)
            plan.tiles.entries[:, 0] = first[0].tiles.entries[0, 0]
        return plan

    def of_none(self: Any, plan: Any, planned: Any) -> None:
        hold(self, plan, planned)
        if self._lora is not None:
            self._lora._words.on_device[:2] = 0  # noqa: SLF001

    first: list[lora.PlannedLora] = []
    match fault:
        case "the ids of the step before":
            patch.setattr(bucket, "hold", late)
        case "keys of rows that pad":
            patch.setattr(CudaStep, "write", all_written)
        case "an adapter's first table":
            patch.setattr(decoding, "planned", never_again)
        case "as many tiles as were recorded":
            patch.setattr(bucket, "hold", of_none)


class _Waiting(torch.nn.Module):
    """Looks at its rows."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y if y.sum() < 1e30 else x


def test_a_base_that_waits_for_the_device_cannot_be_recorded(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base.model.model._modules, "norm", _Waiting(base.model.model.norm))  # noqa: SLF001
    with capture_logs() as logs:
        assert record_steps(base, base.runner(NUM_BLOCKS, BLOCK), BlockPool(NUM_BLOCKS, BLOCK), 4) is None
    assert [line["log_level"] for line in logs] == ["warning"]
    assert "not permitted" in logs[0]["reason"]


@pytest.mark.parametrize("kind", ["dynamic", "longrope", {"full_attention": "longrope"}])
def test_rope_that_looks_at_the_positions_of_a_step_is_not_recorded(
    base: BaseModel, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.model.model.rotary_emb, "rope_type", kind)
    runner = base.runner(NUM_BLOCKS, BLOCK)
    monkeypatch.setattr(runner, "record", lambda _sizes: pytest.fail("it was recorded"))
    with capture_logs() as logs:
        assert record_steps(base, runner, BlockPool(NUM_BLOCKS, BLOCK), 4) is None
    assert "rotary embedding" in logs[0]["reason"]


def test_a_backend_that_records_nothing_says_nothing(proven: BaseModel) -> None:
    with capture_logs() as logs:
        assert record_steps(proven, proven.runner(8, BLOCK), BlockPool(8, BLOCK), 4) is None
    assert logs == []


def test_the_check_of_a_gpu_measures_and_compares_recorded_steps(base: BaseModel) -> None:
    """All that its dry form, whose backend records none, leaves out."""
    report = Report(None, Console(file=io.StringIO()))
    card = Card(CPU, is_dry=True, copy=1e9, matmul=1e9)
    adapters = [adapter(base, 1), adapter(base, 2)]
    graphs.measure_graphs(report, card, "tiny", base)
    steps.measure_decode(report, card, "tiny", base, adapters)
    bits = steps.compare_companies(report, card, "tiny", base, adapters)
    steps.find_waits(report, card, base, adapters)
    assert report.problems == []
    assert [row.what for row in report.rows if row.what.endswith("graph")] == [
        "tiny decode, 1 rows, 0 adapters, graph",
        "tiny decode, 3 rows, 2 adapters, graph",
    ]
    assert bits["adapters, plain or graph"]["rows"] == 2 + 5
    assert all(found["worst"] < 1e-4 and not found["argmax turned"] for found in bits.values())
