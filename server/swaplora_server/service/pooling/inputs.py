"""What is computed of a request's texts: token ids, checked, and what reads the hidden states of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

from swaplora_server.engine.pooling.kinds import Reader
from swaplora_server.engine.request import AdapterUse
from swaplora_server.service.errors import RequestError
from swaplora_server.service.generating.checks import check_ids
from swaplora_server.service.generating.task import Encode
from swaplora_server.service.pooling.layout import Filled
from swaplora_server.service.pooling.tokens import check_numbers
from swaplora_server.service.service import Service


class Input(NamedTuple):
    """One input of the model, and the field of the request that it is of."""

    num_tokens: int
    param: str
    filled: Callable[[], Filled]  # its tokens, made when it begins: many may share a text


class Reading(NamedTuple):
    """What the engine is to do."""

    reader: Reader
    inputs: Sequence[Input]


class Encoded(Protocol):
    """A request's texts as token ids, before it is known who answers."""

    @property
    def most_tokens(self) -> int:
        """No more than these are computed, whoever answers."""

    def reading(self, uses: Sequence[AdapterUse]) -> Reading:
        """What is computed by these. Raises RequestError where they cannot."""


@dataclass(frozen=True, slots=True)
class SingleInputs:
    """Each text is an input of its own."""

    inputs: Sequence[Input]
    reader: Callable[[Sequence[AdapterUse]], Reader]

    @property
    def most_tokens(self) -> int:
        """See `Encoded`."""
        return sum(one.num_tokens for one in self.inputs)

    def reading(self, uses: Sequence[AdapterUse]) -> Reading:
        """See `Encoded`."""
        reader = self.reader(uses)
        check_numbers(reader, len(self.inputs), self.most_tokens)
        return Reading(reader, self.inputs)


async def single_inputs(
    service: Service, encode: Encode, param: Callable[[int], str], reader: Callable[[Sequence[AdapterUse]], Reader]
) -> SingleInputs:
    """Made and checked. `param` is the field of the input of a number. Raises RequestError."""
    given = await encode()
    service.check_serving()
    inputs = [
        Input(len(token_ids), param(number), partial(Filled, token_ids)) for number, token_ids in enumerate(given)
    ]
    for one, token_ids in zip(inputs, given, strict=True):
        check_length(service, one)
        check_ids(service, token_ids, one.param)
    return SingleInputs(inputs, reader)


def check_length(service: Service, one: Input, beside: str = "") -> None:
    """Raise RequestError for an input that is empty or does not fit the context.

    `beside` says what else than its field is in it.
    """
    if not one.num_tokens:
        raise RequestError("invalid_request", f"{one.param} is empty: send some text, or leave it out", one.param)
    if one.num_tokens > service.max_model_len:
        raise RequestError(
            "context_length_exceeded",
            f"This model's maximum context length is {service.max_model_len} tokens. However, {one.param}{beside} has "
            f"{one.num_tokens}. Shorten it, or send truncate_prompt_tokens, of which -1 keeps as many as fit.",
            one.param,
        )
