"""The start-up proof: an architecture is served as stock transformers computes it, shown at start on the base itself.

Before anything is replaced, the stock model computes a few logits. Afterwards the same tokens go through the real
runner: several sequences packed together, in chunks and one by one, over paged KV. Where the two disagree, the base is
refused. In half precision both are held against the stock model in float32: the runner may be off by what the stock
model itself is, and not by much more. A sliding window is short for that while, so that the sequences outgrow it.
Adapters have a proof of their own, in `base/adapter_proof.py`.
"""

from collections import abc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from swaplora_server.base.upcast import upcast
from swaplora_server.engine.attention import UnsupportedAttentionError
from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.lora.modules import LoraEmbedding, LoraLinear, Wrapped, row_dim
from swaplora_server.engine.request import AdapterUse, Request, SamplingParams, Sequence
from swaplora_server.engine.runner import Runner
from swaplora_server.engine.scheduling.batch import Batch, rows_of
from swaplora_server.kernels.backend import Backend

# where each sequence is cut: its chunk of step k is [cuts[k], cuts[k + 1])
_CUTS = ((0, 4, 7, 8, 9), (0, 13, 14), (0, 1, 2, 3))
BLOCK_SIZE = 4
_SHORT_WINDOW = 5  # which the longest outgrows while it is a prompt, and the second one while it decodes
# the largest difference of a logit, in standard deviations of a row's logits, that rounding explains in float32
TOLERANCE = 0.01
# in half precision: times the stock model's own largest difference from float32
NOISE = 3.0


class UnsupportedModelError(ValueError):
    """The base cannot be served; the message says why."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What a passed proof found out on its way."""

    kv_bytes_per_token: int
    addressable: frozenset[str]  # modules that see one row per token, or per sampled token: adapters may change these


@dataclass(frozen=True, slots=True)
class Expected:
    """What is right, each sequence alone, and how far from it rounding may lead."""

    logits: abc.Sequence[Tensor]  # float32 [length, vocab_size] for each of the proof's sequences
    tolerance: float  # in standard deviations of a row's logits
    case: str = "when sequences are packed"


@torch.inference_mode()
def expected_logits(model: PreTrainedModel, products: torch.dtype | None = None) -> Expected:
    """Run the proof's sequences through the model as transformers made it. Raises UnsupportedModelError.

    `products`: what the linears that stand in will round a float32 model's rows to, if they do.
    """
    stock = _stock_logits(model)
    if model.dtype == torch.float32:
        return Expected(stock, TOLERANCE if products is None else tolerance_of(_rounded_logits(model, products), stock))
    try:
        with upcast(model):
            exact = _padded_logits(model)
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"{model.config.model_type} cannot be proven in half precision, start with --dtype float32: {error}"
        ) from error
    return Expected(exact, tolerance_of(stock, exact))


def _rounded_logits(model: PreTrainedModel, products: torch.dtype) -> list[Tensor]:
    with torch.autocast("cpu", dtype=products):
        return _stock_logits(model)


def tolerance_of(rounded: list[Tensor], exact: list[Tensor]) -> float:
    """How far rows may be off, in standard deviations: `NOISE` times what rounding does, and at least `TOLERANCE`.

    Both are [num_rows, vocab_size], or what else a row is of, of each sequence.
    """
    return max(TOLERANCE, NOISE * float(deviations(torch.cat(rounded), torch.cat(exact)).max()))


def _stock_logits(model: PreTrainedModel) -> list[Tensor]:
    return [_stock_output(model, tokens) for tokens in _all_tokens(model)]


def stock_forward(model: PreTrainedModel) -> Tensor:
    """Logits of one of the proof's sequences, for who looks at what happens in the model meanwhile."""
    return _stock_output(model, _all_tokens(model)[0])


@torch.inference_mode()
def _stock_output(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens[None], use_cache=False).logits[0].float()
    return logits


def _padded_logits(model: PreTrainedModel) -> list[Tensor]:
    """The same in one pass: what pads a sequence comes after it, where none of its tokens looks."""
    tokens = _all_tokens(model)
    logits = model(pad_sequence(tokens, batch_first=True), use_cache=False).logits.float()
    return [rows[: len(own)] for rows, own in zip(logits, tokens, strict=True)]


def _all_tokens(model: PreTrainedModel) -> list[Tensor]:
    return [torch.tensor(tokens_of(index, cuts[-1], model), device=model.device) for index, cuts in enumerate(_CUTS)]


def prove(model: PreTrainedModel, backend: Backend, wrapped: Mapping[str, Wrapped], expected: Expected) -> Proof:
    """Run the proof's sequences. Raises UnsupportedModelError when their logits disagree with `expected`."""
    trial = Trial(model, backend)
    with watching(wrapped) as seen:
        batches = trial.run(expected)
    tokens = [sum(rows.num_rows for rows in batch.rows) for batch in batches]
    sampled = [len(batch.rows) for batch in batches]
    return Proof(
        kv_bytes_per_token=trial.kv.bytes_per_token,
        addressable=frozenset(path for path in seen if seen[path] == (sampled if is_head(wrapped[path]) else tokens)),
    )


class Trial:
    """The proof's sequences in a runner of their own, packed and cut into steps."""

    def __init__(
        self,
        model: PreTrainedModel,
        backend: Backend,
        all_cuts: abc.Sequence[abc.Sequence[int]] = _CUTS,
        uses: abc.Sequence[tuple[AdapterUse, ...]] = ((),) * len(_CUTS),
        invoked_at: abc.Sequence[int] = (0,) * len(_CUTS),
    ) -> None:
        """Of each sequence: where it is cut, the adapters that it uses, and the token from which on."""
        self.kv = backend.paged_kv(num_blocks_of(all_cuts), BLOCK_SIZE)
        self._model = model
        self._all_cuts = all_cuts
        self._pool = BlockPool(num_blocks_of(all_cuts), BLOCK_SIZE)
        self._runner = Runner(model, backend, self.kv)
        self._sequences = [
            Sequence(_request(own, first), index)
            for index, (own, first) in enumerate(zip(uses, invoked_at, strict=True))
        ]

    def run(self, expected: Expected) -> list[Batch]:
        """All steps, one after the other. Raises UnsupportedModelError for the first logit that is off."""
        batches = []
        for step in range(max(map(len, self._all_cuts)) - 1):
            batches.append(self._batch(step))
            _compare(self._model, batches[-1], self._logits(batches[-1]), expected)
        return batches

    def _batch(self, step: int) -> Batch:
        """Each sequence's chunk of `step`. Its tokens end with the chunk, so that the chunk's last row samples."""
        rows = []
        for sequence, cuts in zip(self._sequences, self._all_cuts, strict=True):
            if step + 1 < len(cuts):
                sequence.token_ids = tokens_of(sequence.index, cuts[step + 1], self._model)
                self._pool.grow(sequence.block_table, cuts[step + 1])
                rows.append(rows_of(sequence, cuts[step], cuts[step + 1]))
        return Batch(tuple(rows))

    def _logits(self, batch: Batch) -> Tensor:
        try:
            return self._runner.logits(batch).float()
        except (TypeError, AttributeError, RuntimeError, IndexError, UnsupportedAttentionError) as error:
            raise UnsupportedModelError(f"{self._model.config.model_type} does not run packed: {error}") from error


def num_blocks_of(all_cuts: abc.Sequence[abc.Sequence[int]]) -> int:
    """How many blocks the sequences take."""
    return sum(-(-cuts[-1] // BLOCK_SIZE) for cuts in all_cuts)


def _request(uses: tuple[AdapterUse, ...], invoked_at: int) -> Request:
    params = SamplingParams(max_tokens=1)
    return Request("proof", (), params, emit=lambda _event: None, adapters=uses, invoked_at=invoked_at)


@contextmanager
def short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Sliding windows of few tokens, in the stock model's masks and in what its layers ask of their attention."""
    holders = [model.config.get_text_config(), *model.modules()]
    kept = [(holder, vars(holder).get("sliding_window")) for holder in holders]
    long = [(holder, window) for holder, window in kept if isinstance(window, int) and window > _SHORT_WINDOW]
    try:
        for holder, _ in long:
            holder.sliding_window = _SHORT_WINDOW
        yield
    finally:
        for holder, window in long:
            holder.sliding_window = window


def tokens_of(index: int, length: int, model: PreTrainedModel) -> list[int]:
    """The first of a sequence's tokens, which no other sequence has in the same places."""
    vocab_size = model.config.get_text_config().vocab_size
    return [(7 + 13 * position + 5 * index) % vocab_size for position in range(length)]


def _compare(model: PreTrainedModel, batch: Batch, logits: Tensor, expected: Expected) -> None:
    for actual, rows in zip(logits, batch.rows, strict=True):
        deviation = float(deviations(actual, expected.logits[rows.sequence.index][rows.stop - 1]))
        if not deviation <= expected.tolerance:
            raise UnsupportedModelError(
                f"{model.config.model_type} computes something else {expected.case}: "
                f"its logits are off by {deviation:.2g} standard deviations"
            )


def deviations(rows: Tensor, right: Tensor) -> Tensor:
    """[num_rows]: by how much each row of logits is off, in standard deviations of the right ones."""
    return (rows - right).abs().amax(-1) / right.std(-1)


def is_head(module: Wrapped) -> bool:
    """Whether it makes logits of the rows that sample alone."""
    return isinstance(module, LoraLinear) and module.is_head


@contextmanager
def watching(wrapped: Mapping[str, Wrapped]) -> Iterator[dict[str, list[int]]]:
    """How many rows each module turns into as many rows, step by step, filled in as the model runs."""
    seen: dict[str, list[int]] = {path: [] for path in wrapped}

    def note(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        assert isinstance(module, Wrapped)
        seen[module.path].append(_num_rows(module, inputs[0], output) if inputs else 0)

    handles = [module.register_forward_hook(note) for module in wrapped.values()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _num_rows(module: Wrapped, x: object, output: object) -> int:
    """0 for what is no tensor, or does not keep its rows apart. A router's output is a tuple of tensors."""
    if isinstance(output, tuple):
        counts = {_num_rows(module, x, part) for part in output}
        return counts.pop() if len(counts) == 1 else 0
    if not (isinstance(x, Tensor) and isinstance(output, Tensor)):
        return 0
    if isinstance(module, LoraLinear):
        return x.shape[:-1].numel()
    if isinstance(module, LoraEmbedding):
        return x.numel()
    dim = row_dim(x)
    return x.shape[dim] if output.ndim > dim and output.shape[dim] == x.shape[dim] else 0
