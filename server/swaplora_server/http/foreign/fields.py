"""The fields that say who answers: ours, and SGLang's `lora_path`, LoRAX's `adapter_id`, llama.cpp's `lora`.

Imports no torch.
"""

from typing import Annotated

from pydantic import Field, Tag

from swaplora_server.http.transport.models import LIST, TEXT, ClosedModel, WireModel, text_or_list

MAX_MODEL_CHARACTERS = 512
MAX_TERMS = 16
MAX_SCALE = 1000.0
MAX_SCALED_IDS = 4096  # llama.cpp's clients may send back the whole list, most of it at 0
ID_BITS = 31  # some languages' integers have no more

ModelName = Annotated[str, Field(min_length=1, max_length=MAX_MODEL_CHARACTERS)]
NameOrNone = Annotated[str, Field(max_length=MAX_MODEL_CHARACTERS)]  # an empty one names nobody
Scale = Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE)]
Names = Annotated[
    Annotated[NameOrNone, Tag(TEXT)]
    | Annotated[list[NameOrNone | None], Field(min_length=1, max_length=2048, fail_fast=True), Tag(LIST)],
    text_or_list("the name of an adapter, or a list of one for each prompt"),
]


class AdapterTerm(ClosedModel):
    """One adapter of a weighted sum."""

    name: ModelName
    scale: Scale = 1.0


class ScaledId(ClosedModel):
    """One adapter by the number that GET /lora-adapters gives it. One that is not named has scale 0."""

    id: Annotated[int, Field(ge=0, lt=2**ID_BITS)]
    scale: Scale


class NamingBody(WireModel):
    """The fields of a body that say who answers."""

    model: ModelName
    adapters: Annotated[list[AdapterTerm], Field(max_length=MAX_TERMS, fail_fast=True)] | None = None
    lora_path: Names | None = None
    adapter_id: NameOrNone | None = None
    lora: Annotated[list[ScaledId], Field(max_length=MAX_SCALED_IDS, fail_fast=True)] | None = None

    @property
    def num_prompts(self) -> int:
        return 1
