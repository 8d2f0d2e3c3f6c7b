"""A vector of each token of an input, and how many numbers an answer may have that has more than one of each input."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from swaplora_server.base.task_heads import TaskHead
from swaplora_server.engine.pooling.kinds import InputStates, Reader
from swaplora_server.service.errors import RequestError

MAX_NUMBERS = 2**22  # that one answer has, of tokens or of labels


@dataclass(frozen=True, slots=True)
class EachToken:
    """The last hidden state of each token. See `Reader`."""

    hidden_size: int

    @property
    def needs_pooled(self) -> bool:
        return False

    def __call__(self, inputs: Sequence[InputStates], /) -> Sequence[Tensor]:
        """[num_rows, hidden_size] of each."""
        return [one.states for one in inputs]


def check_numbers(reader: Reader, num_inputs: int, num_tokens: int) -> None:
    """Raise RequestError for inputs, of so many tokens all together, of which more is read than one answer has."""
    if isinstance(reader, EachToken):
        number = num_tokens * reader.hidden_size
    elif isinstance(reader, TaskHead):
        number = (num_tokens if reader.task == "TOKEN_CLS" else num_inputs) * reader.num_labels
    else:
        return
    if number > MAX_NUMBERS:
        message = f"an answer has {MAX_NUMBERS} numbers at most, and of these inputs it would have {number}"
        raise RequestError("invalid_request", f"{message}: send fewer or shorter ones", "input")
