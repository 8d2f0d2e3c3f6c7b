"""DeBERTa's attention of packed inputs, put in the place of transformers', which reads them padded.

The rows of its table of distances go through linears that adapters may change, so each set of adapters of a step has
rows of its own. What the base makes of the table is computed once; what adapters add to it in each step, for no more
distances than the longest input of theirs has.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swaplora_server.engine.lora.modules import LoraLinear
from swaplora_server.engine.lora.routing import replaced_rows
from swaplora_server.engine.pooling.deberta_like import Parts, encoder_of, parts_of, rows_of_distances, table_of
from swaplora_server.engine.step import running
from swaplora_server.kernels.backend import Backend, StepRows
from swaplora_server.kernels.step import Runs, Segment, Segments, StepPlan
from swaplora_server.kernels.torch.distances import attend

Bounds = tuple[int, int]  # rows `start` to `stop`


class InputRows(NamedTuple):
    """One input, and which of the step's distances are of its tokens' to each other."""

    start: int
    stop: int
    descending: Tensor  # [2 · length - 1], from the last token's to the first, to the first's to the last
    ascending: Tensor


class StepDistances(NamedTuple):
    """The distances of a step's inputs, those of each set of adapters one after the other."""

    table_rows: Tensor  # [num_rows]: where each lies in the table
    x: Tensor  # [num_rows, hidden_size]: these rows of it
    rows: StepRows
    inputs: Sequence[InputRows]

    def through(self, linear: LoraLinear, of_base: Tensor) -> Tensor:
        """[num_rows, out_features]. of_base: [num_distances, out_features], what the base makes of the whole table."""
        y = of_base[self.table_rows]
        for start, stop, module in replaced_rows(self.rows.segments, linear.path):
            y[start:stop] = module(self.x[start:stop])
        if self.rows.lora is not None:
            self.rows.lora.add(self.x, [(y, linear.number)])
        return y


class DisentangledLayers:
    """The layers of a model of DeBERTa's kind, which read packed steps once they are put in."""

    def __init__(self, model: PreTrainedModel, backend: Backend, max_positions: int) -> None:
        """Of a model whose modules are not wrapped yet. Raises UnsupportedAttentionError."""
        encoder = encoder_of(model)
        self._parts = [parts_of(layer) for layer in encoder.layer]
        table = table_of(encoder)
        of_plan = _OfPlan(table, rows_of_distances(encoder, max_positions).to(table.device), backend)
        self._attention = [_Attention(parts, table) for parts in self._parts]
        self._table = table
        self._weights = {tensor.data_ptr() for tensor in model.parameters()}
        self._exchanged: list[tuple[nn.Module, str, Callable[..., Any]]] = [
            (encoder, "get_rel_embedding", lambda: None),
            (encoder, "get_rel_pos", lambda *_: of_plan(running().plan)),
            (encoder, "get_attention_mask", lambda mask: mask),
            *((own.parts.module, "forward", own) for own in self._attention),
        ]
        convolution = getattr(encoder, "conv", None)
        if convolution is not None:
            self._exchanged.append((convolution, "forward", partial(_one_by_one, convolution.forward)))

    @property
    def of_distances(self) -> frozenset[str]:
        """Paths of the linears that the table goes through."""
        return frozenset(linear.path for parts in self._parts for linear in parts.of_distances)

    @property
    def kept(self) -> Sequence[Tensor]:
        """What was made of the table of distances and is held beside the model's weights, once a step has run."""
        made = [tensor for own in self._attention for tensor in own.of_base.values()]
        return made if self._table.data_ptr() in self._weights else [self._table, *made]

    def put_in(self) -> None:
        """Have the model read packed steps from here on."""
        for module, name, own in self._exchanged:
            setattr(module, name, own)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Meanwhile it computes as transformers made it, one input at a time."""
        for module, name, _ in self._exchanged:
            delattr(module, name)
        try:
            yield
        finally:
            self.put_in()


class _OfPlan:
    """Makes the distances of a step, in the place of the matrix that transformers passes on to every layer."""

    def __init__(self, table: Tensor, rows_of: Tensor, backend: Backend) -> None:
        """`rows_of` as `rows_of_distances` has it."""
        self._table = table
        self._rows_of = rows_of
        self._numbers: list[int] = rows_of.tolist()
        self._middle = len(rows_of) // 2
        self._backend = backend

    def __call__(self, plan: StepPlan) -> StepDistances:
        chosen, segments, inputs, reached = [], [], [], 0
        for own, bounds in _groups(plan.runs, plan.tokens):
            reach = max(stop - start for start, stop in bounds) - 1
            first, last = self._numbers[self._middle - reach], self._numbers[self._middle + reach]
            stop_of_own = reached + last + 1 - first
            segments += [one._replace(start=reached, stop=stop_of_own) for one in own]
            inputs += [self._input(start, stop, reached - first) for start, stop in bounds]
            chosen.append(torch.arange(first, last + 1))
            reached = stop_of_own
        table_rows = torch.cat(chosen).to(self._table.device)
        of_all = Segments(segments)
        lora = self._backend.lora(of_all.adding) if len(of_all.adding) else None
        return StepDistances(table_rows, self._table[table_rows], StepRows(of_all, lora), inputs)

    def _input(self, start: int, stop: int, offset: int) -> InputRows:
        reach = stop - start - 1
        ascending = self._rows_of[self._middle - reach : self._middle + reach + 1] + offset
        return InputRows(start, stop, ascending.flip(0), ascending)


def _groups(runs: Runs, segments: Segments) -> list[tuple[Sequence[Segment], list[Bounds]]]:
    """The inputs of each set of adapters, and these, at the same scales, or chosen among in the same way."""
    groups: dict[tuple[tuple[str, float, str | None], ...], tuple[Sequence[Segment], list[Bounds]]] = {}
    ahead = deque(segments)
    for start, stop in zip(runs.starts.tolist(), runs.stops.tolist(), strict=True):
        while ahead and ahead[0].stop <= start:
            ahead.popleft()
        own = list(takewhile(partial(_is_of, start), ahead))
        groups.setdefault(tuple(map(_key, own)), (own, []))[1].append((start, stop))
    return list(groups.values())


def _key(segment: Segment) -> tuple[str, float, str | None]:
    return segment.weights.digest, segment.scale, None if segment.route is None else segment.route.router.key


def _is_of(row: int, segment: Segment) -> bool:
    return segment.start <= row < segment.stop


class _Attention:
    """Stands in for the forward of one layer's attention."""

    def __init__(self, parts: Parts, table: Tensor) -> None:
        self.parts = parts
        self.table = table
        self.of_base: dict[str, Tensor] = {}  # what the base makes of the table, by the linear's path

    def __call__(
        self, hidden_states: Tensor, _mask: Tensor, *_: object, relative_pos: StepDistances, **__: object
    ) -> tuple[Tensor, None]:
        """hidden_states: [1, num_rows, hidden_size] → the same shape, each input by itself."""
        parts = self.parts
        query, key, value = parts.heads(hidden_states)
        keys, queries = (self._heads_of(linear, relative_pos) for linear in (parts.of_keys, parts.of_queries))
        scaling = float((query.shape[-1] * parts.num_terms) ** -0.5)
        out = torch.empty_like(value)
        for start, stop, descending, ascending in relative_pos.inputs:
            out[start:stop] = attend(
                query[start:stop],
                key[start:stop],
                value[start:stop],
                None if keys is None else keys[descending],
                None if queries is None else queries[ascending],
                scaling,
            )
        return out.flatten(1)[None], None

    def _heads_of(self, linear: LoraLinear | None, distances: StepDistances) -> Tensor | None:
        """[num_rows, num_heads, head_dim]"""
        if linear is None:
            return None
        if linear.path not in self.of_base:
            self.of_base[linear.path] = linear.base(self.table)
        rows = distances.through(linear, self.of_base[linear.path])
        return rows.view(len(rows), self.parts.num_heads, -1)


def _one_by_one(forward: Callable[..., Tensor], rows: Tensor, residual: Tensor, mask: Tensor) -> Tensor:
    """A convolution over neighbours, [1, num_rows, hidden_size], none of which is of another input."""
    runs = running().plan.runs
    bounds = zip(runs.starts.tolist(), runs.stops.tolist(), strict=True)
    return torch.cat([forward(*(part[:, start:stop] for part in (rows, residual, mask))) for start, stop in bounds], 1)
