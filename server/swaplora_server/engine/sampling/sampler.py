"""The next token of every sequence that samples in a step: all rows in one pass, on the device of the logits."""

from collections import abc

import torch
from torch import Tensor

from swaplora_server.engine.outputs import Greedy
from swaplora_server.engine.request import Logprobs, Sequence
from swaplora_server.engine.sampling.bias import Biases
from swaplora_server.engine.sampling.constraint import UnmetConstraintError
from swaplora_server.engine.sampling.draw import draw
from swaplora_server.engine.sampling.filters import Likeliest, keep_likeliest, keep_probable
from swaplora_server.engine.sampling.groups import argmax
from swaplora_server.engine.sampling.logprobs import PendingLogprobs
from swaplora_server.engine.sampling.masks import AllowedTokens, forbid_others
from swaplora_server.engine.sampling.penalties import TokenCounts, penalise
from swaplora_server.engine.sampling.rows import Kind, Row, row_of
from swaplora_server.engine.sampling.transfers import bring, send
from swaplora_server.engine.scheduling.batch import Sampled


class NoTokenError(UnmetConstraintError):
    """Nothing that a request allows can come next."""

    def __init__(self) -> None:
        super().__init__("no token may come next: the format, allowed_token_ids and min_tokens leave none")


class Sampler:
    """Chooses tokens. What it keeps of sequences and requests is made of them again if it is lost."""

    def __init__(self) -> None:
        self._allowed = AllowedTokens()
        self._biases = Biases()
        self._counts = TokenCounts()
        self._scratch = torch.empty(0, 0)

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: abc.Sequence[Sequence], greedy: Greedy | None = None) -> list[Sampled]:
        """logits: [num_sequences, vocab_size]. A row with a logit that is not a number yields no token.

        `greedy`: what is likeliest in them, where that is known.
        """
        logits = logits.float()
        rows, errors = self._look_at(sequences, logits.shape[-1])
        asking = sorted((row for row in rows if row.is_shaped or row.kind), key=lambda row: row.kind)
        are_all_drawn = len(asking) == len(sequences) and all(row.is_drawn for row in asking)
        token_ids, is_finite = greedy or (_nothing if are_all_drawn else Greedy.of)(logits)
        has_token = is_finite
        if asking:
            numbers = _numbers([row.number for row in asking], logits)
            chosen, is_chosen = self._choose(logits, numbers, asking)
            token_ids = token_ids.index_put((numbers,), chosen)
            has_token = has_token.index_put((numbers,), is_chosen)
            is_finite = has_token if are_all_drawn else is_finite
        logprobs = PendingLogprobs(logits, token_ids, rows)
        found = torch.stack((token_ids, is_finite.long(), has_token.long()), dim=-1)
        numbers_of, *packed = bring(found, *logprobs.packed)
        told = logprobs.read(*packed)
        return [_sampled(numbers_of[row], errors.get(row), told.get(row)) for row in range(len(sequences))]

    def _look_at(self, sequences: abc.Sequence[Sequence], vocab_size: int) -> tuple[list[Row], dict[int, Exception]]:
        """What the rows ask for, and by number the errors of those whose constraints raise."""
        rows: list[Row] = []
        errors: dict[int, Exception] = {}
        for number, sequence in enumerate(sequences):
            try:
                rows.append(row_of(number, sequence, self._allowed.of(sequence, vocab_size)))
            except Exception as error:  # noqa: BLE001 - one row's boundary: its neighbours' tokens are what they were
                errors[number] = error
        return rows, errors

    def _choose(self, logits: Tensor, numbers: Tensor, rows: abc.Sequence[Row]) -> tuple[Tensor, Tensor]:
        """A token for each of these rows of the logits, greedy ones first, and whether there was one to choose."""
        room = self._room(logits)[: len(rows)]
        if len(rows) == len(logits) and all(row.is_drawn and row.number == place for place, row in enumerate(rows)):
            return _drawn(logits, rows, room)
        x = torch.index_select(logits, 0, numbers, out=room)
        self._shape(x, rows)
        num_greedy = sum(row.kind is Kind.GREEDY for row in rows)
        best, likeliest = argmax(x[:num_greedy])
        if num_greedy == len(rows):
            return likeliest, best.isfinite()
        drawn, is_drawn = _drawn(x[num_greedy:], rows[num_greedy:], x[num_greedy:])
        return torch.cat((likeliest, drawn)), torch.cat((best.isfinite(), is_drawn))

    def _room(self, logits: Tensor) -> Tensor:
        """Memory to write as many rows into, which is kept: the system takes long to give so much."""
        if len(self._scratch) < len(logits) or self._scratch.shape[-1] != logits.shape[-1]:
            self._scratch = torch.empty_like(logits)
        return self._scratch

    def _shape(self, x: Tensor, rows: abc.Sequence[Row]) -> None:
        """Bias, then what is forbidden, then penalties, as vLLM has it."""
        self._biases.add_to(x, [row.sequence for row in rows])
        if any(row.allowed is not None for row in rows):
            forbid_others(x, [row.allowed for row in rows])
        if penalised := [number for number, row in enumerate(rows) if row.params.is_penalised]:
            sequences = [rows[number].sequence for number in penalised]
            penalise(x, _numbers(penalised, x), sequences, self._counts)


def _nothing(logits: Tensor) -> Greedy:
    """In the place of the likeliest tokens, where nobody wants them."""
    token_ids = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return Greedy(token_ids, torch.ones_like(token_ids, dtype=torch.bool))


def _drawn(x: Tensor, rows: abc.Sequence[Row], room: Tensor) -> tuple[Tensor, Tensor]:
    """A token for each row of logits x, by temperature, top_k, top_p and min_p, and whether there was one.

    Writes over `room`, which may be x. A row with a logit that is not a number has no token.
    """
    if any(row.params.temperature != 1.0 for row in rows):
        x = torch.sub(x, x.amax(-1, keepdim=True), out=room)
        x /= _column([row.params.temperature for row in rows], x, x.dtype)
    probs = torch.softmax(x, -1, out=room)
    _filter(probs, rows)
    drawn = draw(probs, [row.draw_key for row in rows])
    return drawn, probs.gather(1, drawn.unsqueeze(-1)).squeeze(-1) > 0


def _filter(probs: Tensor, rows: abc.Sequence[Row]) -> None:
    kinds = [row.kind for row in rows]
    first, last = kinds.count(Kind.LIKELIEST), len(kinds) - kinds.count(Kind.DRAWN)
    both = first + kinds.count(Kind.LIKELIEST_AND_PROBABLE)
    if both:
        keep_likeliest(probs[:both], _likeliest(rows[:both], probs))
    if first < last:
        min_p = [row.params.min_p for row in rows[first:last]]
        keep_probable(probs[first:last], _column(min_p, probs, probs.dtype))


def _likeliest(rows: abc.Sequence[Row], like: Tensor) -> Likeliest:
    vocab_size = like.shape[-1]
    top_k = [min(row.params.top_k or vocab_size, vocab_size) for row in rows]
    top_p = [row.params.top_p for row in rows]
    return Likeliest(_column(top_k, like, torch.int64), _column(top_p, like, torch.float64), max(top_k))


def _sampled(found: list[int], error: Exception | None, logprobs: Logprobs | None) -> Sampled:
    token_id, is_finite, has_token = found
    if not is_finite:
        return Sampled(None)
    if error is None and not has_token:
        error = NoTokenError()
    return Sampled(token_id, logprobs) if error is None else Sampled(None, error=error)


def _numbers(values: abc.Sequence[int], like: Tensor) -> Tensor:
    return send(values, torch.int64, like.device)


def _column(values: abc.Sequence[float], like: Tensor, dtype: torch.dtype) -> Tensor:
    return send(values, dtype, like.device).unsqueeze(-1)
