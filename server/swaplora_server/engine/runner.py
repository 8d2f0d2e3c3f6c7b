"""Running one step: decode rows and prefill chunks, packed into one forward, come back as sampled tokens."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.engine import attention
from swaplora_server.engine.lora.activation import Activation
from swaplora_server.engine.request import AdapterUse, Request
from swaplora_server.engine.sampling.sampler import Sampler
from swaplora_server.engine.scheduler import Batch, Sampled, ScheduledRows
from swaplora_server.kernels.backend import PagedKV
from swaplora_server.kernels.rows import Run, Segment, StepAdapters

_StepKey = tuple[tuple[object, ...], ...]


class AdapterMismatchError(RuntimeError):
    """A row was about to run with weights other than those its request was admitted with."""


@dataclass(slots=True)
class _Layout:
    """Where each sequence's rows lie in the packed step, and where its output row lies among those that sample."""

    rows: ScheduledRows
    start: int
    stop: int
    head_start: int
    head_stop: int

    @property
    def request(self) -> Request:
        return self.rows.sequence.request

    @property
    def num_base_rows(self) -> int:
        """Its first rows that come before its adapter's invocation, and are the base's."""
        return min(self.rows.num_rows, max(0, self.request.invoked_at - self.rows.start))

    @property
    def run(self) -> Run:
        return Run(self.start, self.stop, self.rows.start, self.rows.sequence.block_table)


class Runner:
    """Turns batches into forwards of one model over one paged cache. Only the engine's thread calls it."""

    def __init__(
        self,
        model: torch.nn.Module,
        activation: Activation,
        kv: PagedKV,
        device: torch.device,
    ) -> None:
        self._model = model
        self._activation = activation
        self._kv = kv
        self._device = device
        self._sampler = Sampler()
        self._adapters: tuple[_StepKey, StepAdapters] = ((), activation.plan((), (), ()))

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[Sampled]:
        """One forward over all of `batch`, then one token for each of `batch.sampling`, in that order."""
        logits = self.logits(batch)
        sampling = batch.sampling
        return self._sampler.sample(logits[: len(sampling)], sampling)

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """[max(1, num_sampling), vocab_size]: the model's output for the last row of each sampling sequence."""
        layouts = list(_lay_out(batch.rows))
        token_ids = [token for rows in batch.rows for token in rows.sequence.token_ids[rows.start : rows.stop]]
        positions = [position for rows in batch.rows for position in range(rows.start, rows.stop)]
        adapters = self._step_adapters(layouts)
        with (
            self._activation.use(adapters),
            attention.use(self._kv.step([layout.run for layout in layouts])),
        ):
            output = self._model(
                input_ids=self._tensor([token_ids]),
                position_ids=self._tensor([positions]),
                logits_to_keep=self._tensor(adapters.logits_to_keep),
                use_cache=False,
            )
        logits: Tensor = output.logits[0]
        return logits

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self._device, non_blocking=True)

    def _step_adapters(self, layouts: list[_Layout]) -> StepAdapters:
        """This step's segments; the last step's when nothing about them changed, as while decoding."""
        key = tuple(
            (layout.request.adapter_key, layout.num_base_rows, layout.stop, layout.head_stop) for layout in layouts
        )
        if key != self._adapters[0]:
            tokens = _segments(layouts, lambda layout: (layout.start + layout.num_base_rows, layout.stop))
            head = _segments(layouts, lambda layout: (layout.head_start, layout.head_stop))
            logits_to_keep = [layout.stop - 1 for layout in layouts if layout.rows.is_sampling] or [0]
            self._adapters = (key, self._activation.plan(tuple(tokens), tuple(head), logits_to_keep))
        return self._adapters[1]

    def forget_adapters(self) -> None:
        """Drop the remembered segments, so that an idle engine keeps no adapter alive."""
        self._adapters = ((), self._activation.plan((), (), ()))


def _lay_out(scheduled: Sequence[ScheduledRows]) -> Iterator[_Layout]:
    start = head_start = 0
    for rows in scheduled:
        head_stop = head_start + rows.is_sampling
        yield _Layout(rows, start, start + rows.num_rows, head_start, head_stop)
        start, head_start = start + rows.num_rows, head_stop


def _segments(layouts: Iterable[_Layout], span: Callable[[_Layout], tuple[int, int]]) -> Iterator[Segment]:
    """Segments over the rows that `span` gives each sequence; neighbours with the same adapters share one."""
    runs: list[tuple[Request, int, int]] = []
    for layout in layouts:
        request, (start, stop) = layout.request, span(layout)
        if runs and runs[-1][0].adapter_key == request.adapter_key and runs[-1][2] == start:
            runs[-1] = (request, runs[-1][1], stop)
        elif start < stop:
            runs.append((request, start, stop))
    for request, start, stop in runs:
        for use in request.adapters:
            yield Segment(checked_weights(use), use.scale, start, stop)


def checked_weights(use: AdapterUse) -> AdapterWeights:
    """The weights of `use`, if they are still those that the request was admitted with."""
    if use.weights.digest != use.digest:
        raise AdapterMismatchError(f"admitted with {use.digest}, about to run with {use.weights.digest}")
    return use.weights
