"""What is computed of a request's texts: token ids, checked, and what reads the hidden states of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from swaplora_server.engine.pooling.kinds import Reader
from swaplora_server.engine.request import AdapterUse
from swaplora_server.service.errors import RequestError
from swaplora_server.service.generation import Encode, check_ids
from swaplora_server.service.service import Service


class Input(NamedTuple):
    """One input of the model, and the field of the request that it is of."""

    token_ids: Sequence[int]
    param: str = "input"
    token_types: Sequence[int] | None = None  # the segment that each token is of; None: all of the first


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
        return sum(len(one.token_ids) for one in self.inputs)

    def reading(self, uses: Sequence[AdapterUse]) -> Reading:
        """See `Encoded`."""
        return Reading(self.reader(uses), self.inputs)


async def single_inputs(
    service: Service, encode: Encode, param: Callable[[int], str], reader: Callable[[Sequence[AdapterUse]], Reader]
) -> SingleInputs:
    """Made and checked. `param` is the field of the input of a number. Raises RequestError."""
    inputs = [Input(token_ids, param(number)) for number, token_ids in enumerate(await encode())]
    service.check_serving()
    for one in inputs:
        check_input(service, one)
    return SingleInputs(inputs, reader)


def check_input(service: Service, one: Input, beside: str = "") -> None:
    """Raise RequestError for an input that is empty, is not of the base's vocabulary, or does not fit the context.

    `beside` says what else than its field is in it.
    """
    if not one.token_ids:
        raise RequestError("invalid_request", f"{one.param} is empty: send some text, or leave it out", one.param)
    check_ids(service, one.token_ids, one.param)
    if len(one.token_ids) > service.max_model_len:
        raise RequestError(
            "context_length_exceeded",
            f"This model's maximum context length is {service.max_model_len} tokens. However, {one.param}{beside} has "
            f"{len(one.token_ids)}. Shorten it, or send truncate_prompt_tokens, of which -1 keeps as many as fit.",
            one.param,
        )
