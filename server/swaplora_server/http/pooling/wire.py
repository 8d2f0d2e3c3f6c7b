"""The bodies of requests for numbers of inputs, as OpenAI defines them and vLLM extends them. Imports no torch."""

from functools import cached_property
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from swaplora_server.http.foreign.fields import NamingBody
from swaplora_server.http.transport.models import NullMeansDefault
from swaplora_server.http.wire import (
    MAX_INT,
    MAX_PROMPT_TOKENS,
    MAX_SALT_CHARACTERS,
    MAX_USER_CHARACTERS,
    Priority,
    Prompt,
    Whole,
    prompts_of,
)

WHAT_FITS = -1  # as vLLM has it


class WholeBody(NamingBody, NullMeansDefault):
    """What all requests have in common that have numbers made of whole inputs."""

    has_content: ClassVar[bool] = True
    takes_place: ClassVar[bool] = True

    truncate_prompt_tokens: Annotated[Whole, Field(ge=WHAT_FITS, le=MAX_PROMPT_TOKENS)] | None = None
    truncation_side: Literal["left", "right"] = "right"
    user: Annotated[str, Field(max_length=MAX_USER_CHARACTERS)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARACTERS)] | None = None
    priority: Priority = 0


class InputBody(WholeBody):
    """Of which numbers are made, each input by itself."""

    input: Prompt
    add_special_tokens: bool = True

    @cached_property
    def inputs(self) -> list[str | list[int]]:
        """One entry per input, whichever of the four forms it came in."""
        return prompts_of(self.input)

    @property
    def num_prompts(self) -> int:
        return len(self.inputs)

    def input_param(self, number: int) -> str:
        """One of many stands at its place in the list."""
        return f"input[{number}]" if isinstance(self.input, list) and len(self.inputs) > 1 else "input"


class EmbeddingBody(InputBody):
    """POST /v1/embeddings."""

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[Whole, Field(ge=1, le=MAX_INT)] | None = None
    normalize: bool | None = None


class ClassifyBody(InputBody):
    """POST /classify and /v1/classify."""

    use_activation: bool = True


class PoolingBody(InputBody):
    """POST /pooling."""

    task: Literal["embed", "classify", "token_embed", "token_classify"] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[Whole, Field(ge=1, le=MAX_INT)] | None = None
    use_activation: bool | None = None
