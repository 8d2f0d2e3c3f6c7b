"""What `swaplora train` is told: the recipe, what it is of, and where the adapter goes."""

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from swaplora_adapters.train.recipe import Recipe


class Job(Recipe):
    """Raises pydantic's ValidationError."""

    base: str = Field(min_length=1, description="embedded, a local folder, or a hub id")
    data: Path = Field(description="A line of JSON for each example")
    out: Path = Field(description="Folder to write the adapter to; it must not be there, or be empty")
    upload: str | None = Field(None, description="A server to upload it to")
    name: str | None = Field(None, min_length=1, description="What it is called there")

    @model_validator(mode="after")
    def _check_upload(self) -> Self:
        if (self.upload is None) != (self.name is None):
            raise ValueError("upload and name: give both, or neither")
        return self

    @property
    def recipe(self) -> Recipe:
        """What of it says how to train."""
        return Recipe(**{name: getattr(self, name) for name in self.model_fields_set & Recipe.model_fields.keys()})


def read_config(path: Path) -> dict[str, Any]:
    """Raises OSError, and ValueError for what is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no TOML: {error}") from error


def complaints(error: ValidationError) -> list[str]:
    """One line for each thing wrong, naming the key."""
    return [_complaint(detail) for detail in error.errors(include_input=False, include_url=False)]


def _complaint(detail: Mapping[str, Any]) -> str:
    reason = str(detail.get("ctx", {}).get("error") or detail["msg"])
    if not detail["loc"]:
        return reason
    name = str(detail["loc"][0])
    if detail["type"] == "extra_forbidden":
        close = get_close_matches(name, Job.model_fields, n=1)
        return f"{name}: no such key" + (f"; did you mean {close[0]}?" if close else "")
    return f"{name}: {reason}"
