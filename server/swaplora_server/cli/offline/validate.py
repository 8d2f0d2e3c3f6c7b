"""`swaplora adapters validate`: what an upload would be answered, found out without a server."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from swaplora_server.cli.common import AsJson, adapter_files, fail, say, show_json
from swaplora_server.cli.settings import read_settings

if TYPE_CHECKING:
    from swaplora_adapters.store.records import Details
    from swaplora_server.base.base_model import BaseModel
    from swaplora_server.config import Settings


def validate(
    folder: Annotated[Path, typer.Argument(help="A folder as PEFT saves it.")],
    base: Annotated[str | None, typer.Option()] = None,
    as_json: AsJson = False,
) -> None:
    """Check an adapter without a server, as one of this base would on upload.

    Reads the environment variables that `swaplora serve` reads, so that limits and number format are the same.
    """
    config, weights = adapter_files(folder)
    settings = read_settings({} if base is None else {"base": base})
    loaded = _load(settings)
    from swaplora_adapters.errors import AdapterTooLargeError, InvalidAdapterError

    try:
        details = _inspect(config, weights, loaded, settings)
    except InvalidAdapterError as error:
        _refuse(error.code, error.reasons, as_json)
    except AdapterTooLargeError as error:
        _refuse(error.code, [str(error)], as_json)
    except OSError as error:
        fail(f"cannot read {error.filename}: {error.strerror}")
    _accept(details, settings.base_id, as_json)


def _load(settings: "Settings") -> "BaseModel":
    """The base as the server loads it; ends the command if that cannot be done."""
    from swaplora_server.banner import Progress
    from swaplora_server.base.loading import load_chosen_base
    from swaplora_server.embedded import EmbeddedBaseError
    from swaplora_server.log_lines import configure_logging

    configure_logging(settings.log_level, as_json=settings.log_json)
    try:
        with Progress() as progress:
            return load_chosen_base(settings, progress.step)
    except (EmbeddedBaseError, OSError, ValueError) as error:
        fail(str(error))


def _inspect(config: Path, weights: Path, base: "BaseModel", settings: "Settings") -> "Details":
    """Raises what an upload raises, in its order: the size of the file, what is in it, its size in memory."""
    from swaplora_adapters.errors import AdapterTooLargeError
    from swaplora_adapters.intake import inspect_files

    if weights.stat().st_size > settings.max_adapter_bytes:
        raise AdapterTooLargeError(f"{weights.name} is larger than {settings.max_adapter_bytes} bytes")
    details = inspect_files(
        config,
        weights,
        base.layers,
        base.dtype,
        base_model=settings.base_id,
        placement=base.backend.placement,
    ).details
    nbytes, room = details.num_parameters * base.dtype.itemsize, settings.adapter_memory_bytes
    if nbytes > room:
        raise AdapterTooLargeError(f"{weights.name} needs {nbytes} bytes of memory, and all adapters have {room}")
    return details


def _accept(details: "Details", base_id: str, as_json: bool) -> None:
    if as_json:
        show_json(
            {
                "valid": True,
                "base": base_id,
                "digest": details.digest,
                "kind": details.kinds,
                "rank": details.rank,
                "targets": details.targets,
                "parameters": details.num_parameters,
                "warnings": details.warnings,
            }
        )
        return
    what = f"rank {details.rank} on {', '.join(details.targets)}; {details.num_parameters} parameters"
    say(f"{details.digest} fits {base_id}: {what}")
    for warning in details.warnings:
        say(f"warning: {warning}")


def _refuse(code: str, reasons: Sequence[str], as_json: bool) -> NoReturn:
    if as_json:
        show_json({"valid": False, "code": code, "reasons": reasons})
        raise typer.Exit(1)
    fail(*reasons)
