"""Settings as options: each has its name, type, default and words from the field of `Settings`, and none of its own.

Reading `Settings` takes a third of the time that `--help` has, so only the commands that take settings do.
"""

from collections.abc import Callable, Mapping
from copy import copy
from functools import wraps
from inspect import Parameter, Signature, signature, unwrap
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer
from typer.core import TyperCommand

from swaplora_server.banner import human_bytes
from swaplora_server.cli.common import fail

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from swaplora_server.config import Settings

ADAPTER_FLAGS = ("--adapter", "--lora-modules", "--lora-paths")
FLAGS = {  # with what other servers call the same
    "adapter": ADAPTER_FLAGS,
    "cuda_graphs": ("--cuda-graphs/--no-cuda-graphs", " /--enforce-eager"),
    "max_batch_tokens": ("--max-batch-tokens", "--max-num-batched-tokens"),
    # both, so that a flag undoes what a file of a training's choices says
    **{name: (f"--{name}/--no-{name}",) for name in ("dora", "rslora", "qlora")},
}
METAVARS = {
    "api_key": "KEY",
    "cors_allow_origin": "ORIGIN",
    "allowed_host": "NAME",
    "root_path": "PATH",
    "adapter": "NAME=PATH",
    "allow_source": "SOURCE",
    "resolver": "SOURCE",
}
PLAIN_HELP: dict[str, Any] = {  # rich's panels alone take a third of the half second that it may take
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
}


class SettingsCommand(TyperCommand):
    """A command that takes settings. It is completed when it is called, and only named in the help of the others."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        app = typer.Typer(add_completion=False, **PLAIN_HELP)
        app.command(self.name)(with_fields(unwrap(self.callback or self.main), self.fields()))
        return typer.main.get_command(app).make_context(*args, **extra)

    def fields(self) -> "Mapping[str, FieldInfo]":
        """What there is an option for each of."""
        from swaplora_server.config import Settings

        return Settings.model_fields


def with_fields(command: Callable[..., None], known: "Mapping[str, FieldInfo]") -> Callable[..., None]:
    """`command`, whose parameters that are fields are explained as these, and whose `**` is an option for each other.

    Those options come after its positional parameters and before its keyword-only ones.
    """
    fields = dict(known)
    own = [_explained(parameter, fields.pop(name, None)) for name, parameter in signature(command).parameters.items()]

    def of_kind(kind: Any) -> list[Parameter]:
        return [parameter for parameter in own if parameter.kind is kind]

    options = [_option(name, field) for name, field in fields.items()] if of_kind(Parameter.VAR_KEYWORD) else []

    @wraps(command)
    def complete(**given: Any) -> None:
        command(**given)

    parameters = [*of_kind(Parameter.POSITIONAL_OR_KEYWORD), *options, *of_kind(Parameter.KEYWORD_ONLY)]
    complete.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return complete


def _explained(parameter: Parameter, field: "FieldInfo | None") -> Parameter:
    if field is None:
        return parameter
    kind, info = get_args(parameter.annotation)
    info = copy(info)
    info.help = _help(field)
    return parameter.replace(annotation=Annotated[kind, info])


def _option(name: str, field: "FieldInfo") -> Parameter:
    """What is not given is None, so that it leaves the environment and the file in force."""
    flags = FLAGS.get(name, (f"--{name.replace('_', '-')}",))
    if field.default is True:
        flags = (f"{flags[0]}/--no-{flags[0].removeprefix('--')}",)
    kind, metavar = (str, "SIZE") if _is_size(field) else (_type(field.annotation), METAVARS.get(name))
    info = typer.Option(*flags, metavar=metavar, help=_help(field))
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info])


def _type(annotation: Any) -> Any:
    """What typer reads a flag as; the rest of what Settings asks of it is left to Settings."""
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (each for each in get_args(annotation) if each is not NoneType)
    if get_origin(annotation) is Annotated:
        annotation = annotation.__origin__
    if get_origin(annotation) is tuple:
        return list[str]
    is_read = get_origin(annotation) is Literal or annotation in (bool, int, float, Path)
    return annotation if is_read else str


def _is_size(field: "FieldInfo") -> bool:
    from swaplora_server.config_values import parse_size

    own = [each for option in get_args(field.annotation) for each in getattr(option, "__metadata__", ())]
    return any(getattr(each, "func", None) is parse_size for each in (*field.metadata, *own))


def _help(field: "FieldInfo") -> str:
    """A field's description with its default, unless it has said that itself."""
    words, default = field.description or "", _default(field)
    if get_origin(field.annotation) is tuple:
        words += "; repeatable"
    if default and "(default" not in words:
        words += f" (default {default})"
    return f"{words}."


def _default(field: "FieldInfo") -> str:
    """As a person writes it; empty where it is nothing, or what anybody would guess."""
    match field.default:
        case True:
            return "on"
        case int(size) if _is_size(field):
            return human_bytes(size).replace(" ", "")
        case False | "auto":
            return ""
        case int() | float() | str() as default:
            return str(default)
        case _:
            return ""


def read_settings(flags: Mapping[str, Any]) -> "Settings":
    """The settings that a server started with these flags would have; ends the command if they are wrong."""
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from swaplora_server.config import Settings, complaints

    try:
        return Settings(**flags)
    except ValidationError as error:
        fail(*complaints(error), code=2)
    except SettingsError as error:
        fail(str(error), code=2)
