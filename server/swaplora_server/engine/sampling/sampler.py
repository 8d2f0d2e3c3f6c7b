"""The next token of every sequence that samples in a step: all rows in one pass, on the device of the logits."""

from collections import abc
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from swaplora_server.engine.outputs import Greedy
from swaplora_server.engine.request import Logprobs, Sequence
from swaplora_server.engine.sampling.bias import Added, Biases
from swaplora_server.engine.sampling.constraint import UnmetConstraintError
from swaplora_server.engine.sampling.draw import draw, noise_of
from swaplora_server.engine.sampling.filters import Likeliest, keep_likeliest, keep_probable
from swaplora_server.engine.sampling.groups import argmax
from swaplora_server.engine.sampling.logprobs import PendingLogprobs
from swaplora_server.engine.sampling.masks import AllowedTokens, forbid_others, put_allowed
from swaplora_server.engine.sampling.penalties import Penalised, TokenCounts, penalise, put_penalised
from swaplora_server.engine.sampling.rows import Kind, Row, row_of
from swaplora_server.engine.sampling.transfers import Outgoing, Sent, bring
from swaplora_server.engine.scheduling.batch import Sampled


class NoTokenError(UnmetConstraintError):
    """Nothing that a request allows can come next."""

    def __init__(self) -> None:
        super().__init__("no token may come next: the format, allowed_token_ids and min_tokens leave none")


class _Drawing(NamedTuple):
    """What is drawn by, row by row, in the order of `Kind`."""

    noise: Sent
    temperatures: Sent | None  # [rows, 1]; None where all are 1
    likeliest: tuple[Sent, Sent, int] | None  # top_k and top_p, [rows, 1] of the first ones, and the largest top_k
    min_p: tuple[Sent, int] | None  # [rows, 1], and the first of the rows that ask for it

    def filter(self, probs: Tensor) -> None:
        """Set to 0 what top_k, top_p and min_p leave out."""
        if self.likeliest is not None:
            top_k, top_p, most = self.likeliest
            keep_likeliest(probs[: len(top_k.tensor)], Likeliest(top_k.tensor, top_p.tensor, most))
        if self.min_p is not None:
            min_p, first = self.min_p
            keep_probable(probs[first : first + len(min_p.tensor)], min_p.tensor)


def _drawing(rows: abc.Sequence[Row], vocab_size: int, outgoing: Outgoing) -> _Drawing:
    asked, kinds = [row.params for row in rows], [row.kind for row in rows]
    first, last = kinds.count(Kind.LIKELIEST), len(kinds) - kinds.count(Kind.DRAWN)
    num_likeliest = first + kinds.count(Kind.LIKELIEST_AND_PROBABLE)

    def column(values: abc.Sequence[float], dtype: type[np.number[Any]]) -> Sent:
        return outgoing.put(np.array(values, dtype)[:, None])

    top_k = [min(params.top_k or vocab_size, vocab_size) for params in asked[:num_likeliest]]
    top_p = [params.top_p for params in asked[:num_likeliest]]
    temperatures = [params.temperature for params in asked]
    return _Drawing(
        outgoing.put(noise_of([row.draw_key for row in rows], vocab_size)),
        column(temperatures, np.float32) if any(of != 1.0 for of in temperatures) else None,
        (column(top_k, np.int64), column(top_p, np.float64), max(top_k)) if top_k else None,
        (column([params.min_p for params in asked[first:last]], np.float32), first) if first < last else None,
    )


class _Asked(NamedTuple):
    """What the rows ask for that ask for something, those first that are not drawn."""

    numbers: Sent  # of them, among the rows of the logits
    added: Added | None
    allowed: Sent | None
    penalised: Penalised | None
    num_greedy: int
    drawing: _Drawing | None  # of the others

    def shape(self, x: Tensor) -> None:
        """Bias, then what is forbidden, then penalties, as vLLM has it."""
        if self.added is not None:
            self.added.to(x)
        if self.allowed is not None:
            forbid_others(x, self.allowed.tensor)
        if self.penalised is not None:
            penalise(x, self.penalised)


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
        outgoing = Outgoing(logits.device)
        logprobs = PendingLogprobs(rows, outgoing)
        asked = self._put(asking, logits.shape[-1], outgoing) if asking else None
        outgoing.send()
        token_ids, is_finite = greedy or (_nothing if are_all_drawn else Greedy.of)(logits)
        has_token = is_finite
        if asked is not None:
            chosen, is_chosen = self._choose(logits, asked, asking)
            numbers = asked.numbers.tensor
            token_ids = token_ids.index_put((numbers,), chosen)
            has_token = has_token.index_put((numbers,), is_chosen)
            is_finite = has_token if are_all_drawn else is_finite
        logprobs.compute(logits, token_ids)
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

    def _put(self, rows: abc.Sequence[Row], vocab_size: int, outgoing: Outgoing) -> _Asked:
        """All that goes to the device of rows that ask for something, greedy ones first."""
        num_greedy = sum(row.kind is Kind.GREEDY for row in rows)
        return _Asked(
            outgoing.put(np.array([row.number for row in rows])),
            self._biases.put([row.sequence for row in rows], outgoing),
            put_allowed([row.allowed for row in rows], vocab_size, outgoing),
            put_penalised([(place, row.sequence) for place, row in enumerate(rows)], self._counts, outgoing),
            num_greedy,
            _drawing(rows[num_greedy:], vocab_size, outgoing) if num_greedy < len(rows) else None,
        )

    def _choose(self, logits: Tensor, asked: _Asked, rows: abc.Sequence[Row]) -> tuple[Tensor, Tensor]:
        """A token for each of these rows of the logits, greedy ones first, and whether there was one to choose."""
        room = self._room(logits)[: len(rows)]
        are_all = len(rows) == len(logits) and all(row.is_drawn and row.number == at for at, row in enumerate(rows))
        if asked.drawing is not None and are_all:
            return _drawn(logits, asked.drawing, room)
        x = torch.index_select(logits, 0, asked.numbers.tensor, out=room)
        asked.shape(x)
        best, likeliest = argmax(x[: asked.num_greedy])
        if asked.drawing is None:
            return likeliest, best.isfinite()
        drawn, is_drawn = _drawn(x[asked.num_greedy :], asked.drawing, x[asked.num_greedy :])
        return torch.cat((likeliest, drawn)), torch.cat((best.isfinite(), is_drawn))

    def _room(self, logits: Tensor) -> Tensor:
        """Memory to write as many rows into, which is kept: the system takes long to give so much."""
        if len(self._scratch) < len(logits) or self._scratch.shape[-1] != logits.shape[-1]:
            self._scratch = torch.empty_like(logits)
        return self._scratch


def _nothing(logits: Tensor) -> Greedy:
    """In the place of the likeliest tokens, where nobody wants them."""
    token_ids = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return Greedy(token_ids, torch.ones_like(token_ids, dtype=torch.bool))


def _drawn(x: Tensor, drawing: _Drawing, room: Tensor) -> tuple[Tensor, Tensor]:
    """A token for each row of logits x, by temperature, top_k, top_p and min_p, and whether there was one.

    Writes over `room`, which may be x. A row with a logit that is not a number has no token.
    """
    if drawing.temperatures is not None:
        x = torch.sub(x, x.amax(-1, keepdim=True), out=room)
        x /= drawing.temperatures.tensor
    probs = torch.softmax(x, -1, out=room)
    drawing.filter(probs)
    drawn = draw(probs, drawing.noise.tensor)
    return drawn, probs.gather(1, drawn.unsqueeze(-1)).squeeze(-1) > 0


def _sampled(found: list[int], error: Exception | None, logprobs: Logprobs | None) -> Sampled:
    token_id, is_finite, has_token = found
    if not is_finite:
        return Sampled(None)
    if error is None and not has_token:
        error = NoTokenError()
    return Sampled(token_id, logprobs) if error is None else Sampled(None, error=error)
