"""Running one step of an encoder: whole inputs, packed without padding, each of which attends to itself alone."""

import inspect
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swaplora_server.engine.pooling.hidden import read_whole
from swaplora_server.engine.scheduling.batch import Batch, Sampled
from swaplora_server.engine.step import Planner, use
from swaplora_server.kernels.backend import Backend, RunningStep, StepRows
from swaplora_server.kernels.step import Ints, Segments, StepForm, StepPlan


class EncoderOutputs(NamedTuple):
    """What an encoder makes of a step's inputs."""

    states: Tensor  # [num_rows, hidden_size]
    pooled: Tensor | None  # [num_inputs, hidden_size]


class EncoderRunner:
    """Turns batches of whole inputs into forwards of one encoder. Only the engine's thread calls it."""

    def __init__(
        self,
        model: PreTrainedModel,
        pooler: nn.Module | None,
        backend: Backend,
        max_positions: int,
        device: torch.device,
    ) -> None:
        """`pooler` is the model's own, taken out of it; `max_positions` the length of the longest input."""
        self._model = model
        self._pooler = pooler
        self._backend = backend
        self._attention = backend.whole_attention()
        self._device = device
        self._planner = Planner(max_positions)
        self._padding_id = padding_id_of(model)
        self._has_types = "token_type_ids" in inspect.signature(model.forward).parameters
        self.num_steps = dict.fromkeys(StepForm, 0)  # see `Runner`

    def stepping(self) -> AbstractContextManager[object]:
        """See `Runner.stepping`."""
        return self._backend.stepping()

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[Sampled]:
        """One forward over all of `batch`, then what each of its requests reads of its input, in that order."""
        self.num_steps[StepForm.PLAIN] += 1
        readers = [rows.sequence.request.reads for rows in batch.rows]
        outputs = self.outputs(batch, has_pooled=any(reads is not None and reads.needs_pooled for reads in readers))
        return [Sampled(None, hidden=vector) for vector in read_whole(*outputs, batch)]

    @torch.inference_mode()
    def outputs(self, batch: Batch, *, has_pooled: bool) -> EncoderOutputs:
        """Of inputs that all want something of their hidden states; `has_pooled`: the pooler's output as well."""
        plan = self._planner.plan(batch.rows)
        step = RunningStep(plan, self._rows(plan.tokens), self._rows(plan.head), self._attention.step(plan.runs))
        inputs = {"input_ids": plan.token_ids, "position_ids": self._positions(plan)}
        if self._has_types:
            inputs["token_type_ids"] = _types(batch, plan)
        with use(step):
            states = self._model(**{name: self._tensor(ids)[None] for name, ids in inputs.items()}).last_hidden_state[0]
            firsts = states[plan.runs.starts.tolist(), None]
            pooled = self._pooler(firsts) if has_pooled and self._pooler is not None else None
        return EncoderOutputs(states, pooled)

    def _rows(self, segments: Segments) -> StepRows:
        return StepRows(segments, self._backend.lora(segments.adding) if len(segments.adding) else None)

    def forget_adapters(self) -> None:
        """Drop what is kept of the last step, so that an idle engine keeps no adapter alive."""
        self._planner.forget_adapters()

    def _positions(self, plan: StepPlan) -> Ints:
        """RoBERTa and those of its kind count from behind the padding's id, and count no padding."""
        if self._padding_id is None:
            return plan.runs.positions
        counts = plan.token_ids != self._padding_id
        counted = np.cumsum(counts)
        starts = plan.runs.starts
        before = np.repeat(counted[starts] - counts[starts], plan.runs.stops - starts)
        positions: Ints = self._padding_id + (counted - before) * counts
        return positions

    def _tensor(self, ids: Ints) -> Tensor:
        return torch.from_numpy(ids).to(self._device, non_blocking=True)


def padding_id_of(model: PreTrainedModel) -> int | None:
    """The id from behind which the model counts positions, if it does."""
    embeddings: Any = getattr(model, "embeddings", None)
    makes_own = hasattr(embeddings, "create_position_ids_from_input_ids")
    return int(embeddings.padding_idx) if makes_own else None


def _types(batch: Batch, plan: StepPlan) -> Ints:
    """The segment that each token is of: 0, unless its request says otherwise."""
    types = np.zeros(plan.runs.num_rows, np.int64)
    for rows, start, stop in zip(batch.rows, plan.runs.starts, plan.runs.stops, strict=True):
        if rows.sequence.request.token_types is not None:
            types[start:stop] = rows.sequence.request.token_types
    return types
