"""What the value of a setting may be: sizes, folders, addresses and names, each with how it is written and checked."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, DirectoryPath, Field, SecretStr
from pydantic_settings import NoDecode

from swaplora_adapters.errors import InvalidAdapterNameError
from swaplora_adapters.files.naming import validate_name
from swaplora_adapters.sources.uri import check_template, parse_prefix

T = TypeVar("T")
ROUTES_BEGIN = (
    "v1",
    "v2",
    "adapters",
    "classify",
    "docs",
    "health",
    "invocations",
    "lora-adapters",
    "metrics",
    "openapi.json",
    "ping",
    "pooling",
    "rerank",
    "score",
    "version",
    "tokenize",
    "detokenize",
    "tokenizer_info",
    "ui",
)
ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*")
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?", re.IGNORECASE)
ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#\s]+")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


def parse_size(value: object) -> object:
    """`"512MiB"`, `"4GB"` or `"1.5G"` as bytes (KiB is 1024, KB is 1000); what is not a string as it is.

    Raises ValueError.
    """
    if not isinstance(value, str):
        return value
    match = SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"{value!r} is not a size: write bytes, or a number with a unit such as 512MiB or 4GB")
    number, prefix, binary = match.groups(default="")
    exponent = " KMGT".index(prefix.upper() or " ")
    return int(float(number) * (1024 if binary else 1000) ** exponent)


def check_name(name: str) -> None:
    """Raise ValueError for what no adapter can be called."""
    try:
        validate_name(name)
    except InvalidAdapterNameError as error:
        raise ValueError(f"adapter: {name[:128]!r}: {error}") from error


def xdg_folder(variable: str, fallback: str) -> Path:
    """The program's folder below an XDG base directory; a relative one is ignored, as the XDG specification asks."""
    root = Path(os.environ.get(variable, ""))
    return (root if root.is_absolute() else Path.home() / fallback) / "swaplora"


def _split_commas(value: object) -> object:
    """A comma-separated string (the environment, YAML) as a list; anything else as it is."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _check_prefix(value: str) -> str:
    parse_prefix(value)
    return value


def _check_shared(value: str) -> str:
    if value.startswith("s3://"):
        parse_prefix(value)
    elif "://" in value:
        raise ValueError(f"{value!r} is neither a folder nor s3://BUCKET/PREFIX")
    return os.path.expanduser(value)


def _check_origin(value: str) -> str:
    if value != "*" and not ORIGIN.fullmatch(value):
        raise ValueError(f"{value!r} is not an origin: write https://HOST or https://HOST:PORT, without a path, or *")
    return value.lower()


def _check_range(value: str) -> str:
    fewest, _, most = value.partition("-")
    if not 1 <= int(fewest) <= int(most or fewest):
        raise ValueError(f"{value!r} is no number of replicas: write 2, or 1-4")
    return value


def _check_root_path(value: str) -> str:
    if not ROOT_PATH.fullmatch(value):
        raise ValueError(f"{value!r} is not a path in front of others: write /PATH, without a slash at its end")
    first = value.split("/")[1] if value else ""
    if first in ROUTES_BEGIN:
        raise ValueError(f"/{first} is where routes themselves begin; give what stands before it, or nothing")
    return value


def _none_if_auto(value: object) -> object:
    return None if value == "auto" else value


def _full_name(dtype: str) -> str:
    """`bfloat16`, `float16`, `float32` or `auto`, whatever it was spelt as."""
    return DTYPES.get(dtype, dtype)


def _expand_home(value: object) -> object:
    return os.path.expanduser(value) if isinstance(value, str) else value


Listed = Annotated[tuple[T, ...], NoDecode, BeforeValidator(_split_commas)]
Size = Annotated[int, BeforeValidator(parse_size), Field(ge=1, le=2**50)]
SizeOrZero = Annotated[int, BeforeValidator(parse_size), Field(ge=0, le=2**50)]
SizeOrAuto = Annotated[Size | None, BeforeValidator(_none_if_auto)]
HomePath = Annotated[Path, BeforeValidator(_expand_home)]
Folder = Annotated[DirectoryPath, BeforeValidator(_expand_home)]
ApiKey = Annotated[SecretStr, Field(min_length=1)]
Origin = Annotated[str, AfterValidator(_check_origin)]
Prefix = Annotated[str, AfterValidator(_check_prefix)]
RootPath = Annotated[str, AfterValidator(_check_root_path)]
ReplicaRange = Annotated[str, Field(pattern=r"^[0-9]{1,4}(-[0-9]{1,4})?$"), AfterValidator(_check_range)]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32", "bf16", "fp16", "fp32", "half", "float"],
    AfterValidator(_full_name),
]
SharedAddress = Annotated[str, Field(min_length=1), AfterValidator(_check_shared)]
Template = Annotated[str, AfterValidator(check_template)]
