"""`swaplora bench`: load on any OpenAI-compatible server, measured from outside."""

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from swaplora_server.cli.common import LOCAL, AsJson, Key, Url, fail, say, show_json, show_table

if TYPE_CHECKING:
    from swaplora_server.bench.connection import Endpoint
    from swaplora_server.bench.options import Options
    from swaplora_server.bench.report import Report

NICENESS = 10  # on a machine that is shared with it, the server comes first
NO_OPTIONS = {"per_adapter", "api_key", "as_json"}  # flags that change nothing of what is sent, and a secret


def bench(
    ctx: typer.Context,
    base: Annotated[str | None, typer.Option(help="What requests call the base.")] = None,
    adapters: Annotated[str | None, typer.Option(metavar="A,B,C", help="Adapters that answer.")] = None,
    distribution: Annotated[
        Literal["base", "same", "distinct", "uniform", "zipf", "power"] | None,
        typer.Option(help="Who answers how many requests (default: distinct, one after the other; or base)."),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Of power: adapter i is asked at rate i^-alpha (1).")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests in flight at all times (default 16).")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests per second that arrive, answered or not.")] = None,
    burstiness: Annotated[
        float | None, typer.Option(help="Gamma shape of the times between them: 1 (default) is Poisson.")
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests that count.")] = 64,
    warmup: Annotated[int, typer.Option(help="Requests before those, which do not.")] = 0,
    prompt_tokens: Annotated[str, typer.Option(metavar="N|A-B", help="Length of the prompts.")] = "128",
    output_tokens: Annotated[str, typer.Option(metavar="N|A-B", help="Length of the answers.")] = "64",
    shared_prefix: Annotated[int, typer.Option(help="First tokens that all prompts have in common.")] = 0,
    vocab_size: Annotated[int, typer.Option(help="Prompts are drawn from the token ids below this.")] = 40_000,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 is greedy.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens of this mass.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from so many of the likeliest tokens.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed makes the same requests.")] = 0,
    slo_ttft: Annotated[float | None, typer.Option(help="Longest good time to the first token, in ms.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(help="Longest good time per token after it, in ms.")] = None,
    per_adapter: Annotated[bool, typer.Option("--per-adapter", help="Figures of each adapter, too.")] = False,
    dialect: Annotated[
        Literal["openai", "llamacpp"],
        typer.Option(help="How an adapter is named: by model, or by its place in --adapters as llama.cpp loaded them."),
    ] = "openai",
    url: Url = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Measure a server under load: throughput, time to the first token, time per token, goodput.

    Prompts are random token ids; answers are of fixed length, streamed, and greedy unless a temperature is given.
    """
    options, endpoint = _checked({name: ctx.params[name] for name in ctx.params.keys() - NO_OPTIONS}, api_key)
    os.nice(NICENESS)
    report = _measured(options, endpoint, per_adapter)
    if as_json:
        show_json(report)
    else:
        _show(report)
    if not report["completed"]:
        fail(f"no request was answered: {report['first_failure']}")


def _checked(given: dict[str, Any], api_key: str | None) -> "tuple[Options, Endpoint]":
    """The run that the flags ask for, and where; ends the command if it cannot be."""
    from swaplora_server.bench.connection import Endpoint
    from swaplora_server.bench.options import Lengths, Options, OptionsError

    adapters = tuple(name.strip() for name in given["adapters"].split(",")) if given["adapters"] else ()
    chosen = {"adapters": adapters, "distribution": given["distribution"] or ("distinct" if adapters else "base")}
    try:
        lengths = {
            name: Lengths.parse(f"--{name.replace('_', '-')}", given[name])
            for name in ("prompt_tokens", "output_tokens")
        }
        # of several keys with commas between, as a server takes them, the first is sent
        endpoint = Endpoint.of(given["url"], api_key and api_key.split(",")[0].strip())
        return Options(**{**given, **chosen, **lengths}), endpoint
    except OptionsError as error:
        fail(*error.args, code=2)


def _measured(options: "Options", endpoint: "Endpoint", per_adapter: bool) -> "Report":
    """The whole report; ends the command if the warm-up fails."""
    import uvloop

    from swaplora_server.bench.load import WarmupError, drive
    from swaplora_server.bench.machine import measure_machine, versions
    from swaplora_server.bench.report import report
    from swaplora_server.bench.server import describe_server

    machine, server = measure_machine(), describe_server(endpoint)
    try:
        load = uvloop.run(drive(options, endpoint))
    except WarmupError as error:
        fail(str(error))
    asked = asdict(options) | {"prompt_tokens": str(options.prompt_tokens), "output_tokens": str(options.output_tokens)}
    figures = report(load, options, per_adapter=per_adapter)
    return {"options": asked, **figures, "machine": machine, "server": server, "versions": versions()}


def _show(report: "Report") -> None:
    from swaplora_server.bench.table import adapters_table, notes, summary, times_table

    for line in summary(report):
        say(line)
    show_table(times_table(report), [] if "adapters" in report else notes(report))
    if "adapters" in report:
        show_table(adapters_table(report), notes(report))
