"""Decoding steps, recorded at start where the backend can, and proven before they serve.

Each bucket is replayed with no adapter, one, a few beside rows of the base, and one of its own for each row. What it
says has to be what the same rows say launched one operation at a time, which the proofs of the base have tried. A base
that cannot be recorded, or computes something else then, is served without.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import structlog
import torch
from torch import Tensor

from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.base.adapter_proof import adding_adapters
from swaplora_server.base.base_model import BaseModel
from swaplora_server.base.device_memory import free_bytes
from swaplora_server.base.proof import UnsupportedModelError, deviations, tokens_of
from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.outputs import Greedy, RowOutputs
from swaplora_server.engine.request import AdapterUse, Request, SamplingParams
from swaplora_server.engine.request import Sequence as Tokens
from swaplora_server.engine.runner import Runner
from swaplora_server.engine.scheduling.batch import Batch, ScheduledRows, rows_of
from swaplora_server.kernels.cuda.graphs.buckets import bucket_sizes
from swaplora_server.kernels.device_fault import fault_of
from swaplora_server.kernels.step import Wants

_log = structlog.get_logger(__name__)
_LENGTHS = (2, 3, 4, 5)  # of the proof's sequences
# rotary embeddings that look at a step's positions to choose what they compute
_CHOOSING = frozenset({"dynamic", "longrope"})

Uses = tuple[AdapterUse, ...]


class RecordedSteps(NamedTuple):
    """What was recorded."""

    num_graphs: int
    num_bytes: int  # of the device


def record_steps(base: BaseModel, runner: Runner, pool: BlockPool, max_rows: int) -> RecordedSteps | None:
    """Have `runner` replay decoding steps of up to `max_rows` rows; None where it cannot, and why in the log.

    `pool` is that of the runner's cache. Nobody else uses either meanwhile. Raises UnsupportedModelError where the
    device computes nothing any more.
    """
    began, before = time.monotonic(), free_bytes(base.device)
    sizes = bucket_sizes(max(1, min(max_rows, pool.num_blocks // pool.blocks_for(_LENGTHS[-1]))))
    try:
        refuse_choosing_rope(base.model)
        num_graphs = runner.record(sizes)
        if num_graphs:
            _prove(base, runner, pool, sizes)
    except Exception as error:  # whatever it is, steps do without
        if (fault := fault_of(base.device)) is not None:
            raise UnsupportedModelError(
                f"the GPU computes nothing any more in this process ({fault}), since steps were recorded: start again "
                "with --no-cuda-graphs, or with --kernels torch"
            ) from error
        runner.forget_graphs()
        _log.warning("decoding steps are launched one operation at a time", reason=_first_line(error))
        return None
    if not num_graphs:
        return None
    recorded = RecordedSteps(num_graphs, (before or 0) - (free_bytes(base.device) or 0))
    seconds = round(time.monotonic() - began, 1)
    _log.info("decoding steps are recorded", graphs=num_graphs, seconds=seconds, bytes=recorded.num_bytes)
    return recorded


def _first_line(error: BaseException) -> str:
    """Of what went wrong first: a recording that is broken off fails once more when it is ended."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0]


def refuse_choosing_rope(model: torch.nn.Module) -> None:
    """Raise UnsupportedModelError for a model whose rotary embedding cannot be recorded."""
    kinds = [getattr(module, "rope_type", None) for module in model.modules()]
    named = {name for kind in kinds for name in (kind.values() if isinstance(kind, Mapping) else [kind])}
    for name in named & _CHOOSING:
        raise UnsupportedModelError(f"the base's rotary embedding, {name}, looks at the positions of a step")


def _prove(base: BaseModel, runner: Runner, pool: BlockPool, sizes: Sequence[int]) -> None:
    """Raises UnsupportedModelError for a bucket that computes something else."""
    lengths = [_LENGTHS[row % len(_LENGTHS)] for row in range(sizes[-1])]
    tables: list[list[int]] = [[] for _ in lengths]
    bases = _rows(base, lengths, tables, [()] * len(lengths))
    apart = max(1, len(lengths) // _LENGTHS[-1])  # no step is of more tokens than one that decodes all of them
    try:
        for length, table in zip(lengths, tables, strict=True):
            pool.grow(table, length)
        prompts = [row._replace(start=0, stop=row.start, wants=Wants.NOTHING) for row in bases]
        for first in range(0, len(prompts), apart):
            runner.logits(Batch(tuple(prompts[first : first + apart])))
        for case, uses in _cases(base, len(lengths)).items():
            rows = _rows(base, lengths, tables, uses)
            expected = runner.logits(Batch(tuple(rows))).float()
            for size in sizes:
                _compare(base, runner.replayed(Batch(tuple(rows[:size]))), expected[:size], case)
    finally:
        for table in tables:
            pool.release(table)
        runner.forget_adapters()


def _rows(
    base: BaseModel, lengths: Sequence[int], tables: Sequence[list[int]], uses: Sequence[Uses]
) -> list[ScheduledRows]:
    """The last token of each sequence."""
    rows = []
    for index, (length, table, own) in enumerate(zip(lengths, tables, uses, strict=True)):
        prompt = tuple(tokens_of(index, length, base.model))
        sequence = Tokens(Request("proof", prompt, SamplingParams(1), lambda _event: None, adapters=own), index)
        sequence.block_table = table
        rows.append(rows_of(sequence, length - 1, length))
    return rows


def _compare(base: BaseModel, outputs: RowOutputs | None, expected: Tensor, case: str) -> None:
    what = f"{len(expected)} recorded rows with {case}"
    if outputs is None:
        raise UnsupportedModelError(f"{what} are not replayed")
    deviation = float(deviations(outputs.logits, expected).max())
    if not deviation <= base.tolerance:
        raise UnsupportedModelError(f"{what} are off by {deviation:.2g} standard deviations of their logits")
    if not torch.equal(outputs.greedy.token_ids, Greedy.of(outputs.logits).token_ids):
        raise UnsupportedModelError(f"{what} have other likeliest tokens than their logits")


def _cases(base: BaseModel, count: int) -> dict[str, list[Uses]]:
    """What each of `count` rows uses."""
    adapters = adding_adapters(base.model, base.layers)
    prepared = [_with_tables(base, weights) for weights in adapters]
    # tables of its own over factors that others have as well, at a scale of its own
    own = [
        _use(_with_tables(base, replace(adapters[row % len(adapters)], digest=f"proof of row {row}")), 0.5 + row / 64)
        for row in range(count)
    ]
    few = [
        () if row % 3 == 0 else _use(prepared[row % 3], 1.0) + (_use(prepared[0], -0.5) if row % 2 else ())
        for row in range(count)
    ]
    return {
        "no adapter": [()] * count,
        "one adapter": [_use(prepared[-1], 1.0)] * count,
        "a few adapters": few,
        "an adapter each": own,
    }


def _with_tables(base: BaseModel, weights: AdapterWeights) -> AdapterWeights:
    return replace(weights, tables=base.backend.tables(weights, base.paths))


def _use(weights: AdapterWeights, scale: float) -> Uses:
    return (AdapterUse(weights, scale, weights.digest),)
