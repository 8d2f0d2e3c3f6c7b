"""Running one step: decode rows and prefill chunks, packed into one forward, come back as sampled tokens."""

import torch
from torch import Tensor

from swaplora_server.engine.sampling.sampler import Sampler
from swaplora_server.engine.scheduler import Batch, Sampled
from swaplora_server.engine.step import Planner, use
from swaplora_server.kernels.backend import Backend, PagedKV, RunningStep, StepRows
from swaplora_server.kernels.step import Ints, Segments, StepPlan


class Runner:
    """Turns batches into forwards of one model over one paged cache. Only the engine's thread calls it."""

    def __init__(self, model: torch.nn.Module, backend: Backend, kv: PagedKV, device: torch.device) -> None:
        self._model = model
        self._backend = backend
        self._kv = kv
        self._device = device
        self._planner = Planner(kv.block_size)
        self._sampler = Sampler()
        self.forget_adapters()

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[Sampled]:
        """One forward over all of `batch`, then one token for each of `batch.sampling`, in that order."""
        logits = self.logits(batch)
        sampling = batch.sampling
        return self._sampler.sample(logits[: len(sampling)], sampling)

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """[max(1, num_sampling), vocab_size]: the model's output for the last row of each sampling sequence."""
        plan = self._planner.plan(batch.rows)
        with use(self._step(plan)):
            output = self._model(
                input_ids=self._tensor(plan.token_ids)[None],
                position_ids=self._tensor(plan.runs.positions)[None],
                logits_to_keep=self._tensor(plan.head_rows),
                use_cache=False,
            )
        logits: Tensor = output.logits[0]
        return logits

    def forget_adapters(self) -> None:
        """Drop what is kept of the last step, so that an idle engine keeps no adapter alive."""
        self._planner.forget_adapters()
        self._tokens = self._head = StepRows(Segments(), None)

    def _step(self, plan: StepPlan) -> RunningStep:
        if plan.tokens is not self._tokens.segments:
            self._tokens, self._head = self._rows(plan.tokens), self._rows(plan.head)
        return RunningStep(plan, self._tokens, self._head, self._kv.step(plan.runs))

    def _rows(self, segments: Segments) -> StepRows:
        return StepRows(segments, self._backend.lora(segments.adding) if len(segments.adding) else None)

    def _tensor(self, values: Ints) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)
