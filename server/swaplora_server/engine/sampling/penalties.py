"""How often each token stands in the sequences that ask for a penalty, and what that does to their logits."""

from collections.abc import Sequence as Rows
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from swaplora_server.engine.request import Sequence


class TokenCounts:
    """For each sequence that was ever asked for: how often it has generated each token, and which its prompt has.

    A sequence's counts are brought up to date when they are asked for, by its new tokens alone.
    """

    def __init__(self) -> None:
        self._slots: WeakKeyDictionary[Sequence, _Slot] = WeakKeyDictionary()
        self._num_generated = torch.zeros(0, 0, dtype=torch.int32)
        self._is_in_prompt = torch.zeros(0, 0, dtype=torch.bool)

    def of(self, sequences: Rows[Sequence], like: Tensor) -> tuple[Tensor, Tensor]:
        """How often each token was generated, and whether the prompt has it: [rows, vocab_size], as wide as `like`."""
        slots = [self._slot(sequence, like) for sequence in sequences]
        self._count(sequences, slots)
        numbers = torch.tensor([slot.number for slot in slots], device=like.device)
        return self._num_generated[numbers], self._is_in_prompt[numbers]

    def _slot(self, sequence: Sequence, like: Tensor) -> "_Slot":
        slot = self._slots.get(sequence)
        if slot is None:
            slot = self._slots[sequence] = _Slot(self._free_number(like))
            self._num_generated[slot.number] = 0
            self._is_in_prompt[slot.number] = False
            prompt = torch.tensor(sequence.request.prompt_ids, dtype=torch.int64, device=like.device)
            self._is_in_prompt[slot.number, prompt] = True
        return slot

    def _free_number(self, like: Tensor) -> int:
        """A row of the tables that no living sequence has; they grow where there is none."""
        free = set(range(len(self._num_generated))) - {slot.number for slot in self._slots.values()}
        if not free:
            free = {len(self._num_generated)}
            more, vocab_size = max(1, len(self._num_generated)), like.shape[-1]
            self._num_generated = _longer(self._num_generated, more, vocab_size, like.device)
            self._is_in_prompt = _longer(self._is_in_prompt, more, vocab_size, like.device)
        return min(free)

    def _count(self, sequences: Rows[Sequence], slots: Rows["_Slot"]) -> None:
        """Count every token that was generated since it was last done."""
        new = [
            (slot.number, token_id)
            for sequence, slot in zip(sequences, slots, strict=True)
            for token_id in sequence.generated_ids(slot.num_counted)
        ]
        if new:
            where = torch.tensor(new, device=self._num_generated.device)
            one = self._num_generated.new_ones(len(new))
            self._num_generated.index_put_((where[:, 0], where[:, 1]), one, accumulate=True)
        for sequence, slot in zip(sequences, slots, strict=True):
            slot.num_counted = sequence.num_generated


class _Slot:
    """A sequence's row in the tables, and how many of its generated tokens are counted in it."""

    def __init__(self, number: int) -> None:
        self.number, self.num_counted = number, 0


def penalise(logits: Tensor, rows: Tensor, sequences: Rows[Sequence], counts: TokenCounts) -> None:
    """Make less likely, in these rows of `logits`, what stands in their sequences already.

    As vLLM has it: repetition_penalty first, of the prompt and what was generated; then, as OpenAI has them,
    frequency_penalty and presence_penalty of what was generated.
    """
    asked = [sequence.request.params for sequence in sequences]
    x = logits[rows]
    num_generated, is_in_prompt = counts.of(sequences, logits)
    repetition = _column([params.repetition_penalty for params in asked], x)
    repeated = torch.where(x > 0, x / repetition, x * repetition).clamp_(max=torch.finfo(x.dtype).max)
    x = torch.where(is_in_prompt | (num_generated > 0), repeated, x)
    x -= _column([params.frequency_penalty for params in asked], x) * num_generated
    x -= _column([params.presence_penalty for params in asked], x) * (num_generated > 0)
    logits[rows] = x


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype).unsqueeze(-1).to(like.device, non_blocking=True)


def _longer(table: Tensor, more: int, width: int, device: torch.device) -> Tensor:
    longer = torch.zeros(len(table) + more, width, dtype=table.dtype, device=device)
    if len(table):
        longer[: len(table)] = table
    return longer
