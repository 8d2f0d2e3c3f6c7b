"""What a decoding step's forward would cost if it were recorded once and replayed: the launches aside, all as it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_checks.card import Card
from gpu_checks.report import Report
from gpu_checks.steps import CASES, CONTEXT, DRY_CASES, Floors
from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.base.base_model import BaseModel
from swaplora_server.engine.step import use
from swaplora_server.kernels.backend import RunningStep, StepRows
from swaplora_server.kernels.step import Runs, Segment, Segments, StepPlan, Wants

BLOCK = 16


def measure_graphs(
    report: Report, card: Card, name: str, base: BaseModel, adapters: list[AdapterWeights]
) -> dict[str, Any]:
    """Forwards alone, recorded; a base that cannot be is a finding."""
    floors, figures = Floors(base, card), {}
    for num_rows, num_adapters in DRY_CASES if card.is_dry else CASES:
        with _decoding(base, num_rows, adapters[:num_adapters]) as forward:
            try:
                seconds = _replay_seconds(card, forward)
            except RuntimeError as error:
                report.finding(f"{name}, {num_rows} rows, {num_adapters} adapters: cannot be recorded: {error}")
                continue
        floor = floors.decode(num_rows, num_adapters, CONTEXT)
        figures[f"{num_rows}x{num_adapters}"] = {"seconds": seconds, "floor": floor}
        report.row(
            f"{name} forward, replayed, {num_rows} rows, {num_adapters} adapters",
            f"{seconds * 1e3:.2f} ms",
            f"{floor * 1e3:.3f} ms",
            floor / seconds,
        )
    return figures


def _replay_seconds(card: Card, forward: Callable[[], Tensor]) -> float:
    if not card.is_gpu:
        return card.seconds(forward, 2)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(2):
            forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        forward()
    return card.seconds(graph.replay, 8)


@contextmanager
def _decoding(base: BaseModel, num_rows: int, adapters: list[AdapterWeights]) -> Iterator[Callable[[], Tensor]]:
    """A forward of `num_rows` decoding rows over tensors that stay where they are; what the cache holds is nobody's."""
    num_blocks = -(-CONTEXT // BLOCK)
    tables = [range(1 + row * num_blocks, 1 + (row + 1) * num_blocks) for row in range(num_rows)]
    runs = Runs([CONTEXT - 1] * num_rows, [CONTEXT] * num_rows, tables, BLOCK)
    # rows of one adapter lie side by side, as the scheduler has them
    segments = Segments(
        [
            Segment(weights, 1.0, number * num_rows // len(adapters), (number + 1) * num_rows // len(adapters))
            for number, weights in enumerate(adapters)
        ]
    )
    ids, rows = (torch.arange(num_rows, device=base.device) for _ in range(2))
    positions = torch.full((1, num_rows), CONTEXT - 1, device=base.device)
    kv = base.backend.paged_kv(num_rows * num_blocks, BLOCK)
    numbers = np.arange(num_rows)
    plan = StepPlan(numbers, runs, np.full(num_rows, Wants.SAMPLE), numbers, segments, Segments())
    lora = base.backend.lora(segments) if adapters else None
    step = RunningStep(plan, StepRows(segments, lora), StepRows(plan.head, None), kv.step(runs))

    def forward() -> Tensor:
        logits: Tensor = base.model(
            input_ids=ids[None], position_ids=positions, logits_to_keep=rows, use_cache=False
        ).logits
        return logits

    with torch.inference_mode(), use(step):
        yield forward
