"""What steps cost: decoding and prompts against their floors, sampling, waits for the card, and where the time goes."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import masking_utils

from gpu_checks.card import Card
from gpu_checks.models import RANK, Stepper, prompt, random_adapter
from gpu_checks.report import Report
from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.base.base_model import BaseModel
from swaplora_server.engine.attention import IMPLEMENTATION
from swaplora_server.engine.scheduling.batch import Batch
from swaplora_server.kernels.cuda.graphs.buckets import bucket_sizes
from swaplora_server.kernels.step import StepForm

CASES = tuple((rows, adapters) for rows in (1, 16, 64, 128) for adapters in (0, 1, 16, 64, 128) if adapters <= rows)
DRY_CASES = ((1, 0), (3, 2))
CONTEXT, NUM_TIMED = 512, 6
PREFILLS = (512, 2048, 8192)


def adapters_of(base: BaseModel, *, is_dry: bool) -> list[AdapterWeights]:
    return [random_adapter(base, number) for number in range(2 if is_dry else max(count for _, count in CASES))]


def stepper_for(base: BaseModel, num_rows: int, context: int, max_batch_tokens: int = 4096) -> Stepper:
    """With room for `num_rows` sequences of `context` tokens, and what they say."""
    return Stepper(base, num_rows * (context // 16 + 6), max_batch_tokens)


class Floors:
    """The least that a step can cost: bytes it must read at the card's copy speed, or operations at its product's."""

    def __init__(self, base: BaseModel, card: Card) -> None:
        self._card = card
        shapes = base.layers.linears
        self._head = sum(shape.in_features * shape.out_features for path, shape in shapes.items() if "lm_head" in path)
        self._layers = sum(shape.in_features * shape.out_features for shape in shapes.values()) - self._head
        ranks = sum(shape.in_features + shape.out_features for path, shape in shapes.items() if "lm_head" not in path)
        self.adapter_bytes = RANK * ranks * base.dtype.itemsize
        self.weight_bytes = (self._head + self._layers) * base.dtype.itemsize
        self._kv_bytes = base.kv_bytes_per_token
        config = base.model.config
        self._attention = 2 * config.num_hidden_layers * config.hidden_size  # operations for each pair of a causal half

    def decode(self, num_rows: int, num_adapters: int, context: int) -> float:
        """Seconds."""
        moved = self.weight_bytes + num_rows * context * self._kv_bytes + num_adapters * self.adapter_bytes
        return max(moved / self._card.copy, 2 * num_rows * (self._head + self._layers) / self._card.matmul)

    def prefill(self, num_tokens: int) -> float:
        """Seconds, of one sequence from its first token on."""
        operations: int = 2 * num_tokens * self._layers + self._attention * num_tokens**2
        return max(operations / self._card.matmul, self.weight_bytes / self._card.copy)


def measure_decode(
    report: Report, card: Card, name: str, base: BaseModel, adapters: list[AdapterWeights]
) -> dict[str, Any]:
    """Whole steps, greedy: schedule, run, sample, commit; launched one operation at a time, and as recorded."""
    floors, figures = Floors(base, card), {}
    context = 40 if card.is_dry else CONTEXT
    cases = DRY_CASES if card.is_dry else CASES
    stepper = stepper_for(base, max(rows for rows, _ in cases), context)
    for form in (StepForm.PLAIN, StepForm.GRAPH):
        if form is StepForm.GRAPH and not stepper.record(max(rows for rows, _ in cases)):
            report.finding(f"{name}: this backend records no steps")
            report.check(stepper.unrecorded is None, f"{name}: steps cannot be recorded: {stepper.unrecorded}")
            continue
        for num_rows, num_adapters in cases:
            for row in range(num_rows):
                chosen = [adapters[row % num_adapters]] if num_adapters else []
                stepper.add(prompt(row, context, base.vocab_size), chosen)
            stepper.decode()
            stepper.times(1)
            before = stepper.runner.num_steps[form]
            times = stepper.times(2 if card.is_dry else NUM_TIMED)
            if stepper.runner.num_steps[form] - before != len(times):
                report.problem(f"{name}: steps of {num_rows} rows, {num_adapters} adapters do not take form {form}")
            stepper.clear()
            floor = floors.decode(num_rows, num_adapters, context)
            figures[f"{num_rows}x{num_adapters} {form}"] = {"seconds": times, "floor": floor}
            report.row(
                f"{name} decode, {num_rows} rows, {num_adapters} adapters, {form}",
                f"{median(times) * 1e3:.2f} ms",
                f"{floor * 1e3:.3f} ms",
                floor / median(times),
            )
    return figures


def measure_prefill(report: Report, card: Card, name: str, base: BaseModel, adapter: AdapterWeights) -> dict[str, Any]:
    """One prompt in one step."""
    floors, figures = Floors(base, card), {}
    for num_tokens in (32,) if card.is_dry else PREFILLS:
        stepper = stepper_for(base, 1, num_tokens, num_tokens)
        for label, chosen in (("base", []), ("1 adapter", [adapter])):
            times = []
            for turn in range(3):
                stepper.add(prompt(turn, num_tokens, base.vocab_size), chosen)
                times += stepper.times(1)
                stepper.clear()
            floor = floors.prefill(num_tokens)
            figures[f"{num_tokens} {label}"] = {"seconds": times, "floor": floor}
            report.row(
                f"{name} prompt of {num_tokens}, {label}",
                f"{min(times) * 1e3:.1f} ms",
                f"{floor * 1e3:.2f} ms",
                floor / min(times),
            )
    return figures


def measure_sampling(report: Report, card: Card, name: str, base: BaseModel) -> dict[str, Any]:
    """What other sampling than greedy adds to a step of the base."""
    num_rows = 4 if card.is_dry else 64
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {},
        "temperature": {"temperature": 1.0, "seed": 1},
        "top_p and top_k": {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 1},
    }
    figures = {}
    stepper = stepper_for(base, num_rows, 16)
    for label, params in kinds.items():
        for row in range(num_rows):
            stepper.add(prompt(row, 8, base.vocab_size), **params)
        stepper.decode()
        figures[label] = median(stepper.times(4))
        stepper.clear()
        report.row(f"{name} step of {num_rows} rows, {label}", f"{figures[label] * 1e3:.2f} ms")
    for label in ("temperature", "top_p and top_k"):
        report.finding(
            f"{name}: sampling with {label} adds {(figures[label] - figures['greedy']) / num_rows * 1e6:.0f} µs a row"
        )
    return figures


def find_waits(report: Report, card: Card, base: BaseModel, adapters: list[AdapterWeights]) -> dict[str, Any]:
    """Where a step waits for the card, by line; torch tells of what it knows to be a wait."""
    if not card.is_gpu:
        report.finding("waits for the card are not looked for on a CPU")
    stepper, figures = stepper_for(base, 16, 64), {}

    def decoding(**params: Any) -> None:
        for row in range(16):
            stepper.add(prompt(row, 32, base.vocab_size), [adapters[row % len(adapters)]], **params)
        stepper.decode()

    decoding()
    figures["decode, greedy"] = _waits(card, stepper.step)
    if stepper.record(16):
        figures["decode, greedy, recorded"] = _waits(card, stepper.step)
        stepper.runner.forget_graphs()
    with _mask_function_registered():
        figures["decode, greedy, with a mask function registered"] = _waits(card, stepper.step)
    stepper.clear()
    decoding(temperature=0.8, top_p=0.9, top_k=50)
    figures["decode, sampled"] = _waits(card, stepper.step)
    stepper.clear()
    stepper.add(prompt(1, 32, base.vocab_size), [adapters[0]])
    figures["prompt"] = _waits(card, stepper.step)
    stepper.clear()
    for label, waits in figures.items():
        report.finding(f"waits of a step, {label}: {sum(waits.values())}: {dict(waits.most_common(6))}")
    return {label: dict(waits) for label, waits in figures.items()}


def _mask_function_registered() -> Any:
    mapping = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping  # noqa: SLF001 - to take it out again
    return patch.dict(mapping, {IMPLEMENTATION: lambda *_args, **_kwargs: None})


def _waits(card: Card, run: Callable[[], object]) -> Counter[str]:
    """Lines of Python at which torch waits for the card, counted over one `run`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if card.is_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            if card.is_gpu:
                torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{os.path.basename(warning.filename)}:{warning.lineno}"
        for warning in caught
        if "called a synchronizing" in str(warning.message)
    )


def compare_companies(
    report: Report, card: Card, name: str, base: BaseModel, adapters: list[AdapterWeights]
) -> dict[str, Any]:
    """Whether a row's logits depend on who is beside it: alone, and in larger and larger steps, in every bucket."""
    sizes = (2, 5) if card.is_dry else (2, 4, 8, 16, 17, 32, 48, 64)
    figures: dict[str, Any] = {}
    forms = (StepForm.PLAIN, StepForm.GRAPH) if stepper_for(base, 1, 64).record(1) else (StepForm.PLAIN,)
    for label, chosen in (("base", []), ("adapters", adapters)):
        together = {form: [_decode_logits(base, list(range(size)), chosen, form) for size in sizes] for form in forms}
        for form, of_form in together.items():
            alone = [_decode_logits(base, [number], chosen, form)[0] for number in range(4)]
            pairs = [pair for rows in of_form for pair in zip(alone, rows, strict=False)]
            figures[f"{label}, {form}, alone or not"] = _compared(pairs)
        pairs = [pair for steps in zip(*together.values(), strict=True) for pair in zip(*steps, strict=True)]
        if len(forms) > 1:
            figures[f"{label}, {' or '.join(forms)}"] = _compared(pairs)
    for label, found in figures.items():
        report.finding(
            f"{name}, {label}: {found['bit for bit']} of {found['rows']} rows are the same bit for bit; "
            f"the others differ by up to {found['worst']:.1e} standard deviations of a logit; "
            f"{found['argmax turned']} likeliest tokens turn"
        )
    return figures


def _compared(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """Two rows of logits each, which may be the same."""
    return {
        "rows": len(pairs),
        "bit for bit": sum(torch.equal(*pair) for pair in pairs),
        "argmax turned": sum(int(own.argmax()) != int(other.argmax()) for own, other in pairs),
        "worst": max(float((own - other).abs().max() / own.std()) for own, other in pairs),
    }


def _decode_logits(
    base: BaseModel, numbers: list[int], adapters: list[AdapterWeights], form: StepForm
) -> list[torch.Tensor]:
    """The logits of the second step of these sequences, which is one of decoding rows."""
    stepper = stepper_for(base, len(numbers), 64)
    requests = [
        stepper.add(prompt(number, 40, base.vocab_size), [adapters[number % len(adapters)]] if adapters else [])
        for number in numbers
    ]
    batch = stepper.scheduler.schedule()
    stepper.scheduler.commit(batch, stepper.runner.run(batch))
    batch = stepper.scheduler.schedule()
    logits = stepper.runner.logits(batch) if form is StepForm.PLAIN else _replayed_logits(stepper, batch)
    of_request = {rows.sequence.request.request_id: row for rows, row in zip(batch.rows, logits.float(), strict=True)}
    return [of_request[request.request_id] for request in requests]


def _replayed_logits(stepper: Stepper, batch: Batch) -> torch.Tensor:
    """Of one bucket that is recorded for it."""
    stepper.runner.record([size for size in bucket_sizes(1 << 10) if size >= len(batch.rows)][:1])
    outputs = stepper.runner.replayed(batch)
    if outputs is None:
        raise ValueError(f"a step of {len(batch.rows)} decoding rows is not replayed")
    return outputs.logits.clone()


def profile_steps(
    report: Report, card: Card, name: str, base: BaseModel, adapters: list[AdapterWeights]
) -> dict[str, Any]:
    """Launches, and the kernels that take longest, of one decoding step."""
    figures: dict[str, Any] = {}
    context = 40 if card.is_dry else CONTEXT
    for num_rows, num_adapters in DRY_CASES if card.is_dry else ((1, 0), (16, 0), (16, 16)):
        stepper = stepper_for(base, num_rows, context)
        for row in range(num_rows):
            chosen = [adapters[row % num_adapters]] if num_adapters else []
            stepper.add(prompt(row, context, base.vocab_size), chosen)
        stepper.decode()
        stepper.times(2)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if card.is_gpu else [])]
        with profile(activities=activities) if card.is_gpu else nullcontext() as found:
            stepper.step()
            card.wait()
        if found is None:
            continue
        figures[f"{num_rows}x{num_adapters}"] = told = _told(found)
        report.finding(
            f"{name} step of {num_rows} rows, {num_adapters} adapters: {told['launches']} launches, "
            f"{told['copies']} copies, {told['kernel_ms']:.2f} ms in kernels; "
            + ", ".join(
                f"{kernel['ms']:.2f} ms in {kernel['count']} {kernel['name'][:60]}" for kernel in told["top"][:4]
            )
        )
    return figures


def _told(found: Any) -> dict[str, Any]:
    events = found.key_averages()
    kernels = [event for event in events if event.self_device_time_total > 0 and event.self_cpu_time_total == 0]
    by_time = sorted(kernels, key=lambda event: -event.self_device_time_total)

    def count(*names: str) -> int:
        return sum(event.count for event in events if any(name in event.key for name in names))

    return {
        "launches": count("cudaLaunchKernel", "cuLaunchKernel"),
        "copies": count("cudaMemcpyAsync"),
        "waits": count("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
        "kernel_ms": sum(event.self_device_time_total for event in kernels) / 1e3,
        "top": [
            {"name": event.key, "count": event.count, "ms": event.self_device_time_total / 1e3}
            for event in by_time[:16]
        ],
        "host": [
            {"name": event.key, "count": event.count, "ms": event.self_cpu_time_total / 1e3}
            for event in sorted(events, key=lambda event: -event.self_cpu_time_total)[:16]
        ],
    }
