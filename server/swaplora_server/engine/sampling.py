"""From logits to the next token of each sampling sequence. A row's draw depends on its own logits and seed alone."""

from collections import abc
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from swaplora_server.engine.request import Logprobs, SamplingParams, Sequence
from swaplora_server.engine.scheduler import Sampled

_LEAST_LOGPROB = -9999.0


class Sampler:
    """Keeps one random generator per sampled sequence, for as long as the sequence lives."""

    def __init__(self) -> None:
        self._generators: WeakKeyDictionary[Sequence, torch.Generator] = WeakKeyDictionary()

    def sample(self, logits: Tensor, sequences: abc.Sequence[Sequence]) -> list[Sampled]:
        """logits: [num_sequences, vocab_size]. A row with a logit that is not a number yields no token."""
        logits = logits.float()
        best, greedy_ids = logits.max(dim=-1)  # NaN wins a max, so one look tells
        finite = best.isfinite().tolist()
        token_ids = greedy_ids.tolist()
        sampled: list[Sampled] = []
        for row, (sequence, is_finite) in enumerate(zip(sequences, finite, strict=True)):
            if not is_finite:
                sampled.append(Sampled(None))
                continue
            try:
                token_id = self._choose(logits[row], token_ids[row], sequence)
                sampled.append(Sampled(token_id, _logprobs(logits[row], token_id, sequence.request.params)))
            except Exception as error:  # noqa: BLE001 - one row's boundary: what the others drew must not be drawn again
                sampled.append(Sampled(None, error=error))
        return sampled

    def _choose(self, logits: Tensor, greedy_id: int, sequence: Sequence) -> int:
        params = sequence.request.params
        if params.stop_token_ids and not params.may_end_at(sequence.num_generated + 1):
            logits = logits.index_fill(0, _as_index(params.stop_token_ids, logits), float("-inf"))
            greedy_id = int(logits.argmax())
        if params.is_greedy:
            return greedy_id
        return self._draw(filtered_probs(logits, params), sequence)

    def _draw(self, probs: Tensor, sequence: Sequence) -> int:
        """One draw by exponential races: argmax p/e, with e ~ Exp(1), is distributed as p."""
        generator = self._generators.get(sequence)
        if generator is None:
            generator = self._generators[sequence] = _generator_for(sequence)
        race = torch.empty(probs.shape, dtype=probs.dtype).exponential_(generator=generator).to(probs.device)
        return int((probs / race).argmax())


def filtered_probs(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities of one row [vocab_size] after temperature, then top_k, top_p and min_p, each of what is left."""
    probs = ((logits - logits.max()) / params.temperature).softmax(-1)
    if params.top_k or params.top_p < 1.0:
        ordered, order = probs.sort(descending=True, stable=True)
        drop = torch.zeros_like(ordered, dtype=torch.bool)
        if params.top_k:
            drop[params.top_k :] = True
        kept = ordered.masked_fill(drop, 0.0)
        kept = kept / kept.sum()
        drop |= kept.cumsum(-1) - kept >= params.top_p
        drop[0] = False
        probs = probs.masked_fill(torch.zeros_like(drop).scatter(0, order, drop), 0.0)
    if params.min_p:
        probs = probs.masked_fill(probs < params.min_p * probs.max(), 0.0)
    return probs


def _generator_for(sequence: Sequence) -> torch.Generator:
    generator = torch.Generator()
    seed = sequence.request.params.seed
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed + sequence.index)
    return generator


def _as_index(token_ids: frozenset[int], like: Tensor) -> Tensor:
    return torch.tensor(sorted(token_ids), device=like.device)


def _logprobs(logits: Tensor, token_id: int, params: SamplingParams) -> Logprobs | None:
    if params.num_logprobs is None:
        return None
    logprobs = logits.log_softmax(-1).clamp(min=_LEAST_LOGPROB)  # JSON has no infinity
    top = logprobs.topk(min(params.num_logprobs, logprobs.numel()))
    return Logprobs(float(logprobs[token_id]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
