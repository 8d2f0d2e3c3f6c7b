"""Decoding steps of every bucket, recorded; each later one is padded to a bucket and replayed.

Importing this needs triton: see `require_triton`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from swaplora_server.kernels.backend import Forward, RunningStep, StepInputs, StepRows
from swaplora_server.kernels.cuda.attention import CudaKV, CudaStep
from swaplora_server.kernels.cuda.graphs.buckets import Layout, bucket_for, layout_of
from swaplora_server.kernels.cuda.graphs.recorder import Recorder
from swaplora_server.kernels.cuda.lora import CudaLora, PlannedLora, planned
from swaplora_server.kernels.cuda.lora_tiles import CapacityError
from swaplora_server.kernels.cuda.words import Words
from swaplora_server.kernels.step import Runs, Segments, StepForm, StepPlan, Wants


class _Planned(NamedTuple):
    """What LoRA does in steps with these segments, and whether it can be replayed."""

    tokens: Segments
    lora: PlannedLora | None
    is_recorded: bool


class CudaGraphs:
    """See `Graphs`. All graphs read the same words, each its own layout of them."""

    def __init__(
        self, kv: CudaKV, dtype: torch.dtype, forward: Forward, sizes: Sequence[int], recorder: Recorder
    ) -> None:
        """Record each of `sizes`, ascending, for the base alone and for adapters. Raises RuntimeError."""
        self._sizes = sizes
        self._dtype = dtype
        layouts = [
            layout_of(rows, has_lora=has_lora, num_blocks=kv.num_blocks, block_size=kv.block_size)
            for rows in reversed(sizes)  # what is recorded later fits into the memory of what was before
            for has_lora in (True, False)
        ]
        words = Words.zeros(max(layout.num_words for layout in layouts), kv.device)
        self._graphs: dict[tuple[int, bool], tuple[_Bucket, Callable[[], None]]] = {}
        for layout in layouts:
            bucket = _Bucket(layout, words, kv, dtype)
            replay = recorder.record(partial(forward, bucket.inputs, bucket.step))
            self._graphs[layout.rows, layout.lora is not None] = bucket, replay
        self.forget_adapters()

    def __len__(self) -> int:
        return len(self._graphs)

    def forget_adapters(self) -> None:
        """See `Graphs`."""
        self._planned = _Planned(Segments(), None, True)

    def replay(self, plan: StepPlan) -> StepForm:
        """See `Graphs`."""
        rows = bucket_for(plan.runs.num_rows, self._sizes)
        if not _decodes(plan):
            return StepForm.PROMPT
        if rows is None:
            return StepForm.ROOM
        if plan.tokens is not self._planned.tokens:
            self._planned = self._plan(plan)
        if not self._planned.is_recorded:
            return StepForm.ADAPTER
        bucket, replay = self._graphs[rows, self._planned.lora is not None]
        try:
            bucket.hold(plan, self._planned.lora)
        except CapacityError:
            return StepForm.ROOM
        replay()
        return StepForm.GRAPH

    def _plan(self, plan: StepPlan) -> _Planned:
        tokens = plan.tokens
        has_others = any(len(own) for own in (tokens.replacing, tokens.embedding, tokens.routed))
        is_recorded = not has_others and tokens.has_same_rows(plan.head)
        lora = planned(tokens.adding, self._dtype) if is_recorded and len(tokens.adding) else None
        return _Planned(tokens, lora, is_recorded)


class _Bucket:
    """The words of one layout, and the step that reads them."""

    def __init__(self, layout: Layout, words: Words, kv: CudaKV, dtype: torch.dtype) -> None:
        """Of no rows yet: whatever is computed is nobody's, and is written nowhere."""
        self._layout = layout
        self._words = words.part(0, layout.num_words)
        room = layout.room
        self._lora = (
            None
            if layout.lora is None
            else CudaLora(layout.lora, dtype, kv.device, words.part(2 * layout.rows, layout.lora_words))
        )
        self._paged = CudaStep(kv, room, words.part(layout.num_words - room.num_words, room.num_words))
        nobodys = Runs((), (), (), kv.block_size)
        nothing = np.empty(0, np.int64)
        self._plan = StepPlan(nothing, nobodys, nothing, nothing, Segments(), Segments())
        self.hold(self._plan, planned(Segments(), dtype))

    @property
    def inputs(self) -> StepInputs:
        """Of its step."""
        token_ids, positions = self._words.on_device[: 2 * self._layout.rows].view(2, -1)
        return StepInputs(token_ids, positions, 0)

    @property
    def step(self) -> RunningStep:
        """Whatever it holds."""
        rows = StepRows(Segments(), self._lora)
        return RunningStep(self._plan, rows, rows, self._paged)

    def hold(self, plan: StepPlan, lora: PlannedLora | None) -> None:
        """This step from now on: rows beyond its own are token 0 at position 0. Raises CapacityError."""
        runs = plan.runs
        inputs = self._words.writable()[: 2 * self._layout.rows].reshape(2, -1)
        inputs[:, runs.num_rows :] = 0
        inputs[0, : runs.num_rows], inputs[1, : runs.num_rows] = plan.token_ids, runs.positions
        self._paged.write(runs)
        if self._lora is not None and lora is not None:
            self._lora.write(lora)
        self._words.send(self._layout.num_used(len(runs.blocks)))


def _decodes(plan: StepPlan) -> bool:
    """Whether each row is a sequence's newest and samples."""
    return plan.runs.num_rows == len(plan.runs) and bool((plan.wants == Wants.SAMPLE).all())
