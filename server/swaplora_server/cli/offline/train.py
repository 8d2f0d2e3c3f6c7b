"""`swaplora train`: an adapter from a file of examples."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swaplora_server.cli.common import AsJson, Key, connected, fail, say, short_digest, show_json
from swaplora_server.cli.settings import SettingsCommand, read_settings

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from swaplora_adapters.train.run import Progress
    from swaplora_adapters.train.train import Trained
    from swaplora_server.cli.offline.training_job import Job
    from swaplora_server.config import Settings

INTERRUPTED = 130  # as a shell has it
LINES = 20  # of progress, where no terminal has a bar


class TrainCommand(SettingsCommand):
    """Has an option for each choice of a job."""

    def fields(self) -> "Mapping[str, FieldInfo]":
        from swaplora_server.cli.offline.training_job import Job

        return Job.model_fields


def train(
    ctx: typer.Context,
    base: Annotated[str | None, typer.Argument()] = None,
    data: Annotated[Path | None, typer.Argument(metavar="DATA.jsonl")] = None,
    *,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="File of the same choices; flags win.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that did not end.")] = False,
    api_key: Key = None,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Train an adapter on examples, lines of prompt and completion or of messages. What is learnt are the answers.

    A run that was killed goes on with --resume, and comes to the same.
    """
    job = _read_job(config, {name: value for name, value in ctx.params.items() if value not in (None, [], ())})
    settings = read_settings({"base": job.base})
    if job.upload is not None:
        with connected(job.upload, api_key) as client:
            client.models()  # whether it is there is better known before the training than after
    trained = _train(job, settings, resume=resume)
    if as_json:
        show_json(_as_json(trained))
    else:
        say(f"{job.out} has the adapter of step {trained.history.kept}; its card is README.md")
    if job.upload is not None and job.name is not None:
        _upload(job.upload, api_key, job.name, job.out)


def _read_job(config: Path | None, given: Mapping[str, Any]) -> "Job":
    """The file's choices with the flags' over them; ends the command if they are wrong."""
    from pydantic import ValidationError

    from swaplora_server.cli.offline.training_job import Job, complaints, read_config

    try:
        chosen = {} if config is None else read_config(config)
        return Job(**(chosen | {name: value for name, value in given.items() if name in Job.model_fields}))
    except ValidationError as error:
        fail(*complaints(error), code=2)
    except OSError as error:
        fail(f"cannot read {error.filename}: {error.strerror}", code=2)
    except ValueError as error:
        fail(str(error), code=2)


def _train(job: "Job", settings: "Settings", *, resume: bool) -> "Trained":
    """Ends the command with what is wrong."""
    # OpenMP's runtime reads this when torch loads it: on cores that others use too, threads that spin while they wait
    # for each other take several times as long
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    import torch
    import transformers

    from swaplora_adapters.errors import InvalidAdapterError
    from swaplora_adapters.train.data import DataError
    from swaplora_adapters.train.train import Task, train
    from swaplora_server.base.encoder.encoder_base import is_encoder
    from swaplora_server.base.loading import pick_device, source_of
    from swaplora_server.embedded import EmbeddedBaseError
    from swaplora_server.log_lines import configure_logging

    configure_logging(settings.log_level, as_json=settings.log_json)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        source = source_of(settings, lambda step: say(step, err=True))
        if is_encoder(transformers.AutoConfig.from_pretrained(source)):
            fail(f"{settings.base_id} is an encoder, which answers nothing: name a base that generates")
        task = Task(source, settings.base_id, job.data, job.out, pick_device(settings.device))
        with _bar() as progress:
            return train(task, job.recipe, resume=resume, report=_remark, progress=progress)
    except (DataError, InvalidAdapterError) as error:
        fail(*error.reasons)
    except torch.OutOfMemoryError:
        fail(
            f"the device's memory is too small: remove {job.out}.training and begin anew with a smaller batch_size, or "
            "with smaller max_tokens"
        )
    except (EmbeddedBaseError, OSError, ValueError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        begun = Path(f"{job.out.resolve()}.training").exists()
        say(f"swaplora: interrupted{'; the same command with --resume goes on' if begun else ''}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _remark(remark: str) -> None:
    say(f"remark: {remark}", err=True)


@contextmanager
def _bar() -> "Iterator[Progress]":
    """On no terminal a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=None)
        shown = 0

        def progress(done: int, total: int, loss: float | None, held_out: float | None) -> None:
            nonlocal shown
            words = [
                f"{name} {value:.3f}" for name, value in (("loss", loss), ("held out", held_out)) if value is not None
            ]
            bar.update(task, completed=done, total=total, description=", ".join(words) or "training")
            if not console.is_terminal and done * LINES // total > shown:
                shown = done * LINES // total
                say(f"step {done} of {total}: {', '.join(words) or 'training'}", err=True)

        yield progress


def _upload(url: str, api_key: str | None, name: str, folder: Path) -> None:
    with (
        connected(url, api_key) as client,
        (folder / "adapter_config.json").open("rb") as config,
        (folder / "adapter_model.safetensors").open("rb") as weights,
    ):
        card = client.put_adapter(name, config, weights)
    say(f"{name}@{card.get('version')} is stored ({short_digest(card)})", err=True)


def _as_json(trained: "Trained") -> dict[str, object]:
    history, origin = trained.history, trained.origin
    return {
        "steps": history.num_steps,
        "kept": history.kept,
        "final_loss": history.final_loss,
        "held_out": [{"step": step, "loss": loss} for step, loss in history.held_out],
        "base": origin.base_digest,
        "data": origin.data.digest,
        "learnt": origin.num_learnt,
        "remarks": list(trained.remarks),
    }
