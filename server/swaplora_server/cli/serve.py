"""`swaplora serve`: the flags, as settings, for the server; and those of other servers, in our terms."""

import gc
import json
import os
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from swaplora_server.cli.common import fail
from swaplora_server.cli.settings import ADAPTER_FLAGS, read_settings

LIMITS_OF_OTHERS = ("max_loras", "max_cpu_loras", "max_lora_rank", "max_loras_per_batch", "max_loaded_loras")
MODULE_FORMS = (("name", "path"), ("lora_name", "lora_path"))

LimitOfOthers = Annotated[int | None, typer.Option(help="Accepted; no such limit here.")]


def spread_values(args: Sequence[str]) -> list[str]:
    """`--lora-modules a=x b=y`, several values after one flag as other servers take them, with the flag before each."""
    spread: list[str] = []
    for arg in args:
        is_adapter = "=" in arg or arg.startswith("{")
        if is_adapter and not arg.startswith("-") and len(spread) > 1 and spread[-2] in ADAPTER_FLAGS:
            spread.append(spread[-2])
        spread.append(arg)
    return spread


def serve(
    ctx: typer.Context,
    base: Annotated[str | None, typer.Argument()] = None,
    *,
    model: Annotated[str | None, typer.Option("--model", "--model-path", help="Same as BASE.")] = None,
    enable_lora: Annotated[bool | None, typer.Option("--enable-lora", help="Accepted; always on here.")] = None,
    max_loras: LimitOfOthers = None,
    max_cpu_loras: LimitOfOthers = None,
    max_lora_rank: LimitOfOthers = None,
    max_loras_per_batch: LimitOfOthers = None,
    max_loaded_loras: LimitOfOthers = None,
    **flags: Any,
) -> None:
    """Serve a base model and its adapters.

    Each flag is also an environment variable (SWAPLORA_PORT) and a key of the --config file (port); flags win.
    """
    given = {name: value for name, value in ctx.params.items() if value not in (None, [], ())}
    settings = read_settings(_in_our_terms(given))
    # OpenMP's runtime reads this when torch loads it: threads that wait spin briefly, then leave their core to HTTP
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    gc.disable()  # it would go through all that is imported, again and again, for a sixth of the time
    from swaplora_server.serve import StartError, run

    gc.enable()
    try:
        run(settings)
    except StartError as error:
        fail(str(error))


def _in_our_terms(given: dict[str, Any]) -> dict[str, Any]:
    """The flags as settings, with those of other servers translated or, where nothing corresponds, remarked on."""
    for name in LIMITS_OF_OTHERS:
        if given.pop(name, None) is not None:
            flag = name.replace("_", "-")
            typer.echo(f"swaplora: --{flag} is ignored: only --adapter-memory-bytes limits adapters", err=True)
    given.pop("enable_lora", None)
    base = given.pop("model", None)
    if base is not None and given.setdefault("base", base) != base:
        fail("BASE and --model name different models: give one of them", code=2)
    if "adapter" in given:
        given["adapter"] = tuple(map(_name_and_path, given["adapter"]))
    return given


def _name_and_path(value: str) -> str:
    """NAME=PATH, also from the JSON objects that other servers take; what one asks beyond that is refused."""
    if not value.startswith("{"):
        return value
    try:
        module = json.loads(value)
    except ValueError:
        module = {}
    form = next((form for form in MODULE_FORMS if module.keys() >= set(form)), None)
    if form is None:
        fail(f'{value} is neither NAME=PATH nor {{"name": …, "path": …}}', code=2)
    if unknown := module.keys() - {*form, "base_model_name"}:
        fail(f"{value}: {', '.join(sorted(unknown))} is not honoured here: leave it out", code=2)
    name, path = form
    return f"{module[name]}={module[path]}"
