"""Task files: JSONL, each line one item, which is a prompt or messages and the one thing an answer is held to."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from swaplora_adapters.errors import InvalidAdapterError
from swaplora_adapters.files import strict_json
from swaplora_server.evaluation.validators import regex_validator, schema_validator

MAX_ITEMS = 10_000
MAX_TASK_BYTES = 8 << 20
MAX_ITEM_BYTES = 256 << 10
MAX_DEPTH = 64
MAX_TURNS = 256
MAX_CHOICES = 26
MAX_REGEX_CHARACTERS = 4096
Kind = Literal["answer", "choices", "schema", "regex"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_SHOWN_CHARACTERS = 64


class TaskError(ValueError):
    """A task that cannot be read; the message names the line, or the place in the list, and the key."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


class Turn(_Part):
    """One message of a conversation."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str


class Item(_Part):
    """One thing that is asked, and what its answer is held to."""

    prompt: str | None = None
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_TURNS)] | None = None
    answer: str | None = None
    choices: Annotated[list[str], Field(min_length=2, max_length=MAX_CHOICES)] | None = None
    correct: Annotated[int, Field(ge=0)] | None = None  # which of the choices
    schema_: Annotated[dict[str, Any] | bool | None, Field(alias="schema")] = None
    regex: Annotated[str, Field(min_length=1, max_length=MAX_REGEX_CHARACTERS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_nulls(cls, value: Any) -> Any:
        if isinstance(value, dict) and (empty := next((name for name, one in value.items() if one is None), None)):
            raise ValueError(f"{empty[:_SHOWN_CHARACTERS]}: null says nothing: leave it out")
        return value

    @field_validator("prompt")
    @classmethod
    def _asks_something(cls, prompt: str | None) -> str | None:
        if prompt is not None and not prompt.strip():
            raise ValueError("must not be blank")
        return prompt

    @field_validator("choices")
    @classmethod
    def _differ(cls, choices: list[str] | None) -> list[str] | None:
        if choices is not None and ("" in choices or len(set(choices)) < len(choices)):
            raise ValueError("must be texts that are not empty, no two alike")
        return choices

    @field_validator("schema_")
    @classmethod
    def _is_schema(cls, schema: dict[str, Any] | bool | None) -> dict[str, Any] | bool | None:
        if schema is not None:
            schema_validator(schema)
        return schema

    @field_validator("regex")
    @classmethod
    def _is_regex(cls, regex: str | None) -> str | None:
        if regex is not None:
            regex_validator(regex)
        return regex

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if len(self._given("prompt", "messages")) != 1:
            raise ValueError("give exactly one of prompt and messages")
        if len(self._given(*KINDS)) != 1:
            raise ValueError(f"give exactly one of {', '.join(KINDS)}")
        if self.choices is None and self.correct is not None:
            raise ValueError("correct: says which of the choices is right, and there are none")
        if self.choices is not None and (self.correct is None or self.correct >= len(self.choices)):
            raise ValueError(f"correct: must say which of the choices is right: 0 to {len(self.choices) - 1}")
        return self

    @cached_property
    def kind(self) -> Kind:
        """What it is held to."""
        kind: Kind = self._given(*KINDS)[0]
        return kind

    @property
    def canonical(self) -> str:
        """The same for all spellings of the same item."""
        return json.dumps(self.model_dump(by_alias=True, exclude_unset=True), ensure_ascii=False, sort_keys=True)

    def _given(self, *names: Any) -> list[Any]:
        return [name for name in names if getattr(self, "schema_" if name == "schema" else name) is not None]


@dataclass(frozen=True, slots=True)
class Task:
    """Items in their order, and a digest that is the same for all spellings of them."""

    items: tuple[Item, ...]
    digest: str


def parse_task(given: str | Sequence[Any]) -> Task:
    """A task of JSONL, or of a list of its items. Raises TaskError, which names what is wrong and where."""
    items = tuple(_items(_lines(given) if isinstance(given, str) else _listed(given)))
    if not items:
        raise TaskError("there is no item in it")
    hashed = hashlib.sha256()
    for item in items:
        hashed.update(f"{item.canonical}\n".encode())
    return Task(items, f"sha256:{hashed.hexdigest()}")


def _items(values: Iterable[tuple[str, Any]]) -> Iterator[Item]:
    for number, (place, value) in enumerate(values):
        if number == MAX_ITEMS:
            raise TaskError(f"{place}: a task may have {MAX_ITEMS} items")
        yield _item(place, value)


def _item(place: str, value: Any) -> Item:
    if not isinstance(value, dict):
        raise TaskError(f"{place}: must be an object")
    try:
        return Item.model_validate(value)
    except ValidationError as error:
        [detail, *_] = error.errors(include_url=False, include_context=False, include_input=False)
        keys = [str(part) for part in detail["loc"] if part not in ("dict[str,any]", "bool")]
        key = ".".join(keys)[:_SHOWN_CHARACTERS]
        reason = detail["msg"].removeprefix("Value error, ")[:200]
        raise TaskError(f"{place}: {key}: {reason}" if key else f"{place}: {reason}") from error


def _lines(text: str) -> Iterator[tuple[str, Any]]:
    """Blank lines are counted, and say nothing."""
    if len(text) > MAX_TASK_BYTES or len(raw := text.encode(errors="surrogatepass")) > MAX_TASK_BYTES:
        raise TaskError(f"a task may have {MAX_TASK_BYTES} bytes")
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            place = f"line {number}"
            try:
                value = strict_json.loads(line, what=place, max_bytes=MAX_ITEM_BYTES, max_depth=MAX_DEPTH)
            except InvalidAdapterError as error:
                raise TaskError(str(error)) from error
            yield place, value


def _listed(values: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    total = 0
    for number, value in enumerate(values):
        size = len(json.dumps(value))
        total += size
        if size > MAX_ITEM_BYTES:
            raise TaskError(f"task[{number}] is larger than {MAX_ITEM_BYTES} bytes")
        if total > MAX_TASK_BYTES:
            raise TaskError(f"a task may have {MAX_TASK_BYTES} bytes")
        yield f"task[{number}]", value
