"""What bodies are read as: numbers finite, unknown fields kept to be looked at, or refused. Imports no torch."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Discriminator, field_validator

BRANCH = "|"  # what the tag of a union's branch begins with: no part of a path for clients
TEXT, LIST = f"{BRANCH}text", f"{BRANCH}list"


def text_or_list(description: str) -> Discriminator:
    """Of a union of a text, tagged `TEXT`, and a list, `LIST`: the branch that a value is of alone complains."""
    return Discriminator(_form, "form", f"must be {description}")


def _form(value: object) -> str | None:
    return TEXT if isinstance(value, str) else LIST if isinstance(value, list) else None


class Body(BaseModel):
    """What a request's body is read as."""

    has_content: ClassVar[bool] = False  # such as a prompt, which may be as large as the operator allows
    takes_place: ClassVar[bool] = False  # among all that runs and waits


class WireModel(Body):
    """A JSON object. Numbers are finite and of their own type; unknown fields are kept, to be looked at."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True, hide_input_in_errors=True)


class NullMeansDefault(WireModel):
    """OpenAI's clients send null for what they leave open."""

    @field_validator("*", mode="before")
    @classmethod
    def _null_means_default(cls, value: object, info: Any) -> object:
        field = cls.model_fields[info.field_name]
        return field.default if value is None and not field.is_required() else value


class ClosedModel(WireModel):
    """A request body of our own: a field that nobody defines is an error."""

    model_config = ConfigDict(extra="forbid")
