"""How often each token stands in the sequences that ask for a penalty, and what that does to their logits."""

from collections.abc import Sequence as Rows
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from swaplora_server.engine.request import Sequence
from swaplora_server.engine.sampling.transfers import send_tensor


class TokenCounts:
    """For each sequence that was ever asked for: the tokens that it has, and how often it has generated each.

    A sequence's counts are brought up to date when they are asked for, by its new tokens alone.
    """

    def __init__(self) -> None:
        self._counts: WeakKeyDictionary[Sequence, dict[int, int]] = WeakKeyDictionary()

    def of(self, sequence: Sequence) -> dict[int, int]:
        """How often each token was generated; 0 for those that only the prompt has, which repetition_penalty counts."""
        counts = self._counts.get(sequence)
        if counts is None:
            request = sequence.request
            prompt_ids = request.prompt_ids if request.params.repetition_penalty != 1.0 else ()
            counts = self._counts[sequence] = dict.fromkeys(prompt_ids, 0)
        num_counted = sum(counts.values())
        for token_id in sequence.generated_ids(num_counted):
            counts[token_id] = counts.get(token_id, 0) + 1
        return counts


def penalise(logits: Tensor, rows: Tensor, sequences: Rows[Sequence], counts: TokenCounts) -> None:
    """Make less likely, in these rows of `logits`, what stands in their sequences already; the rest is not touched.

    As vLLM has it: repetition_penalty first, of the prompt and what was generated; then, as OpenAI has them,
    frequency_penalty and presence_penalty of what was generated.
    """
    counted = [counts.of(sequence) for sequence in sequences]
    lengths = torch.tensor([len(each) for each in counted])
    tokens = torch.tensor([(token, count) for each in counted for token, count in each.items()])
    tokens = tokens.long().view(-1, 2)
    token_ids, num_generated = send_tensor(tokens, logits.device).unbind(1)
    asked = [sequence.request.params for sequence in sequences]
    repetition, frequency, presence = (
        send_tensor(torch.tensor(values, dtype=logits.dtype).repeat_interleave(lengths), logits.device)
        for values in zip(
            *((each.repetition_penalty, each.frequency_penalty, each.presence_penalty) for each in asked), strict=True
        )
    )
    counts_of = send_tensor(lengths, rows.device)
    places = rows.repeat_interleave(counts_of, output_size=len(tokens)), token_ids
    x = logits[places]
    x = torch.where(x > 0, x / repetition, x * repetition).clamp_(max=torch.finfo(x.dtype).max)
    logits[places] = x - frequency * num_generated - presence * (num_generated > 0)
