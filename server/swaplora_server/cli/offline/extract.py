"""`swaplora extract`: an adapter of a full fine-tune, which then shares the base with all others."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from swaplora_server.cli.common import AsJson, cell, fail, say, show_json, show_table
from swaplora_server.cli.settings import read_settings

if TYPE_CHECKING:
    from swaplora_adapters.derive.whole_models.extract import Extraction


def extract(
    model: Annotated[Path, typer.Argument(help="The fine-tuned model's folder, as transformers saves it.")],
    out: Annotated[Path, typer.Option(help="Folder to write the adapter to; it must not be there, or be empty.")],
    base: Annotated[str | None, typer.Option()] = None,
    rank: Annotated[int, typer.Option(min=1, help="The most that a module keeps.")] = 64,
    energy: Annotated[
        float, typer.Option(help="Share of each module's squared singular values to keep, if the rank allows.")
    ] = 0.99,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(help="Parameters that may differ and are not kept, such as '*norm*'; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make an adapter of what a full fine-tune changed in the base's linears, and tell how near it comes.

    Whatever else was changed is refused by name, unless it may be left out.
    """
    if not 0 < energy <= 1:
        fail("--energy is a share: above 0, and at most 1", code=2)
    if not model.is_dir():
        fail(f"{model} is no folder: give the one that the fine-tuned model was saved to")
    settings = read_settings({} if base is None else {"base": base})
    from swaplora_adapters.derive.whole_models.extract import NotLowRankError, extract_adapter, holding
    from swaplora_adapters.errors import AdapterTooLargeError
    from swaplora_server.base.loading import source_of
    from swaplora_server.embedded import EmbeddedBaseError
    from swaplora_server.log_lines import configure_logging

    configure_logging(settings.log_level, as_json=settings.log_json)
    try:
        source = source_of(settings, lambda step: say(step, err=True))
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("extracting", total=None)
            found = extract_adapter(
                source,
                model,
                out,
                holding(energy, rank),
                leave_out or (),
                base_model=settings.base_id,
                progress=lambda path, done, total: bar.update(task, completed=done, total=total),
            )
    except NotLowRankError as error:
        fail(*error.reasons)
    except (EmbeddedBaseError, AdapterTooLargeError, OSError, ValueError) as error:
        fail(str(error))
    if as_json:
        show_json(_as_json(found))
    else:
        _show(found, out)


def _as_json(found: "Extraction") -> dict[str, object]:
    from swaplora_adapters.derive.lowrank import relative_error

    return {
        "error": relative_error(found.modules.values()),
        "modules": {path: {"rank": part.rank, "error": part.error} for path, part in found.modules.items()},
        "left_out": found.left_out,
        "other_tokens": found.other_tokens,
    }


def _show(found: "Extraction", out: Path) -> None:
    from swaplora_adapters.derive.lowrank import relative_error

    table = Table("module", "rank", "error", box=None)
    for path, part in found.modules.items():
        table.add_row(cell(path), str(part.rank), f"{part.error:.1%}")
    notes = [f"left out: {name}, which is {part:.1%} from the base's" for name, part in found.left_out.items()]
    notes += [f"the base's {field} stays: the fine-tune has another" for field in found.other_tokens]
    error = relative_error(found.modules.values())
    show_table(table, [*notes, f"{out} has {len(found.modules)} modules, and lacks {error:.1%} of what they changed"])
