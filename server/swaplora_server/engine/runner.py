"""Running one step: decode rows and prefill chunks, packed into one forward, come back as sampled tokens."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate, repeat
from typing import Protocol

import torch
from torch import Tensor

from swaplora_adapters.weights.router import Trace
from swaplora_server.engine.outputs import RecordedOutputs, RowOutputs
from swaplora_server.engine.pooling.hidden import noting_hidden_states, read_last
from swaplora_server.engine.request import Vector
from swaplora_server.engine.sampling.logprobs import scores
from swaplora_server.engine.sampling.sampler import Sampler
from swaplora_server.engine.scheduling.batch import Batch, Sampled, ScheduledRows
from swaplora_server.engine.step import Planner, use
from swaplora_server.kernels.backend import Backend, Graphs, PagedKV, PagedStep, RunningStep, StepInputs, StepRows
from swaplora_server.kernels.step import Segments, StepForm, StepPlan, Wants


class StepRunner(Protocol):
    """What an engine has its batches run by. Only the engine's thread calls it."""

    @property
    def num_steps(self) -> Mapping[StepForm, int]:
        """That `run` was called for; they only grow, any thread may read them."""

    def stepping(self) -> AbstractContextManager[object]:
        """Around a step, from the decision what is in it to the last of its events."""

    def run(self, batch: Batch) -> list[Sampled]:
        """What each of `batch.asking` asked for, in that order."""

    def forget_adapters(self) -> None:
        """Drop what is kept of the last step, so that an idle engine keeps no adapter alive."""


class Runner:
    """Turns batches into forwards of one model over one paged cache. Only the engine's thread calls it.

    Where decoding steps have been recorded they are replayed; all others are launched one operation at a time.
    """

    def __init__(self, model: torch.nn.Module, backend: Backend, kv: PagedKV) -> None:
        self._model = model
        self._backend = backend
        self._kv = kv
        self._planner = Planner(kv.block_size)
        self._sampler = Sampler()
        self._graphs: Graphs | None = None
        self._recorded = RecordedOutputs()
        self.num_steps = dict.fromkeys(StepForm, 0)  # that `run` was called for; only grow, any thread may read them
        self.forget_adapters()

    def stepping(self) -> AbstractContextManager[object]:
        """Around a step, from the decision what is in it to the last of its events."""
        return self._backend.stepping()

    @torch.inference_mode()
    def record(self, sizes: Sequence[int]) -> int:
        """Record decoding steps of each of these numbers of rows, ascending, in place of what was recorded.

        Returns of how many graphs; 0 where the backend records none. Raises RuntimeError for a model that cannot be
        recorded.
        """
        self.forget_graphs()
        self._graphs = self._backend.graphs(self._kv, self._forward_recorded, sizes)
        return 0 if self._graphs is None else len(self._graphs)

    def forget_graphs(self) -> None:
        """Have nothing recorded."""
        self._graphs, self._recorded = None, RecordedOutputs()

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[Sampled]:
        """One forward over all of `batch`, then what each of `batch.asking` asked for, in that order."""
        form = self._replay(batch)
        self.num_steps[form] += 1
        sampling = batch.sampling
        if form is StepForm.GRAPH:
            logits, greedy = self._recorded.rows(len(sampling))
            return self._sampler.sample(logits, sampling, greedy)
        asking = batch.asking
        if len(sampling) == len(asking) and not any(rows.num_scored for rows in asking):
            return self._sampler.sample(self.logits(batch)[: len(sampling)], sampling)
        return self._run_asking(batch, asking)

    def _run_asking(self, batch: Batch, asking: Sequence[ScheduledRows]) -> list[Sampled]:
        """Where some ask for other than a next token."""
        logits, vectors = self._logits_and_vectors(batch)
        stops = list(accumulate(rows.num_heads for rows in asking))
        ends = [stop - 1 for stop, rows in zip(stops, asking, strict=True) if rows.is_sampling]
        sampled = iter(self._sampler.sample(logits[ends], batch.sampling) if ends else ())
        hidden = (Sampled(None, hidden=vector) for vector in vectors)
        answers: dict[Wants, Iterator[Sampled]] = {
            Wants.SAMPLE: sampled,
            Wants.HIDDEN: hidden,
            Wants.NOTHING: repeat(Sampled(None)),
        }
        return [
            _scored(rows, logits[stop - rows.num_heads : stop], next(answers[rows.wants]))
            for stop, rows in zip(stops, asking, strict=True)
        ]

    def _logits_and_vectors(self, batch: Batch) -> tuple[Tensor, list[Vector | None]]:
        if not any(rows.wants is Wants.HIDDEN for rows in batch.rows):
            return self.logits(batch), []
        with noting_hidden_states(self._model) as noted:
            logits = self.logits(batch)
        return logits, read_last(noted[-1], batch)

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """[max(1, num_heads), vocab_size]: the model's output for each row of `batch.asking` that reaches its head.

        Launched one operation at a time, whatever has been recorded.
        """
        plan = self._planner.plan(batch.rows)
        inputs, paged = self._kv.begin(plan)
        logits = self._forward(inputs, self._step(plan, paged))
        for rows in batch.rows:
            if (trace := rows.sequence.request.trace) is not None:
                self._show_shares(trace, rows.stop)
        return logits

    def _show_shares(self, trace: Trace, stop: int) -> None:
        """Of its rows before token `stop`, all of them and those that reach the head, which are the last ones."""
        for lora in (self._tokens.lora, self._head.lora):
            if lora is not None and (shares := lora.shares(trace)) is not None:
                trace.note(stop - shares.shape[1], shares)

    @torch.inference_mode()
    def replayed(self, batch: Batch) -> RowOutputs | None:
        """What `run` chooses from, until the next step; None where `batch` takes another form than a recorded one."""
        form = self._replay(batch)
        return self._recorded.rows(len(batch.sampling)) if form is StepForm.GRAPH else None

    def forget_adapters(self) -> None:
        """Drop what is kept of the last step, so that an idle engine keeps no adapter alive."""
        self._planner.forget_adapters()
        self._tokens = self._head = StepRows(Segments(), None)
        if self._graphs is not None:
            self._graphs.forget_adapters()

    def _replay(self, batch: Batch) -> StepForm:
        """Launch a step of `batch` as it was recorded, where it was."""
        if self._graphs is None:
            return StepForm.PLAIN
        return self._graphs.replay(self._planner.plan(batch.rows)) if batch.is_decoding else StepForm.PROMPT

    def _forward_recorded(self, inputs: StepInputs, step: RunningStep) -> None:
        self._recorded.keep(self._forward(inputs, step))

    def _forward(self, inputs: StepInputs, step: RunningStep) -> Tensor:
        with use(step):
            output = self._model(
                input_ids=inputs.token_ids[None],
                position_ids=inputs.positions[None],
                logits_to_keep=inputs.head_rows,
                use_cache=False,
            )
        logits: Tensor = output.logits[0]
        return logits

    def _step(self, plan: StepPlan, paged: PagedStep) -> RunningStep:
        if plan.tokens is not self._tokens.segments:
            self._tokens, self._head = self._rows(plan.tokens), self._rows(plan.head)
        return RunningStep(plan, self._tokens, self._head, paged)

    def _rows(self, segments: Segments) -> StepRows:
        return StepRows(segments, self._backend.lora(segments.adding) if len(segments.adding) else None)


def _scored(rows: ScheduledRows, logits: Tensor, sampled: Sampled) -> Sampled:
    """With the scores of its prompt's tokens; logits: [rows.num_heads, vocab_size]."""
    request = rows.sequence.request
    first = rows.scored_stop - rows.num_scored + 1
    token_ids = request.prompt_ids[first : first + rows.num_scored]
    return sampled._replace(
        scores=scores(logits[: rows.num_scored], token_ids, request.params.num_prompt_logprobs or 0)
    )
