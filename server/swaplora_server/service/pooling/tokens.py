"""A vector of each token of an input, where all of them are there to be read: of encoders."""

from collections.abc import Sequence

from torch import Tensor

from swaplora_server.engine.pooling.kinds import InputStates
from swaplora_server.service.errors import RequestError
from swaplora_server.service.service import Service

MAX_NUMBERS = 2**22  # that one answer has


class EachToken:
    """The last hidden state of each token. See `Reader`."""

    needs_pooled = False

    def __call__(self, inputs: Sequence[InputStates], /) -> Sequence[Tensor]:
        """[num_rows, hidden_size] of each."""
        return [one.states for one in inputs]


def max_tokens(service: Service) -> int:
    """Of the inputs of one answer. Raises RequestError for a base that generates."""
    if service.generates:
        message = "task token_embed is for encoders: of a base that generates the last token's state alone is read"
        raise RequestError("unsupported_field", message, "task")
    hidden_size: int = service.base.model.config.hidden_size
    return MAX_NUMBERS // hidden_size
