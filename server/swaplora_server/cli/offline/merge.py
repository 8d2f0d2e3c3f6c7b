"""`swaplora merge`: a stand-alone model of a base and some adapters, without a server."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from swaplora_server.cli.common import adapter_files, fail, say
from swaplora_server.cli.settings import read_settings


def merge(
    folders: Annotated[list[Path], typer.Argument(help="Adapters' folders, as PEFT saves them.", metavar="FOLDER")],
    out: Annotated[Path, typer.Option(help="Folder to write the model to; it must not be there, or be empty.")],
    base: Annotated[str | None, typer.Option()] = None,
    scale: Annotated[
        list[float] | None, typer.Option(help="How much of each adapter, in their order; 1 unless given.")
    ] = None,
) -> None:
    """Add adapters to a base model's weights for good, and save it as transformers reads it.

    The base's own number format is kept; the sum is made in float32.
    """
    scales = _scales(folders, scale)
    for folder in folders:
        adapter_files(folder)
    settings = read_settings({} if base is None else {"base": base})
    from swaplora_adapters.derive.whole_models.export import export_model
    from swaplora_adapters.errors import InvalidAdapterError
    from swaplora_server.base.loading import source_of
    from swaplora_server.embedded import EmbeddedBaseError
    from swaplora_server.log_lines import configure_logging

    configure_logging(settings.log_level, as_json=settings.log_json)
    try:
        source = source_of(settings, lambda step: say(step, err=True))
        export_model(source, folders, scales, out)
    except InvalidAdapterError as error:
        fail(*error.reasons)
    except (EmbeddedBaseError, OSError, ValueError) as error:
        fail(str(error))
    say(f"{settings.base_id} with {len(folders)} adapter{'s' * (len(folders) > 1)} merged in is in {out}")


def _scales(folders: Sequence[Path], scales: Sequence[float] | None) -> Sequence[float]:
    if scales and len(scales) != len(folders):
        fail(f"{len(folders)} adapters have {len(scales)} scales: give one --scale for each, or none", code=2)
    return scales or [1.0] * len(folders)
