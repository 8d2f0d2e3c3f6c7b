"""`swaplora serve`: the flags, as settings, for the server."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from swaplora_server.cli.common import fail, read_settings

ADAPTER_FLAGS = ("--adapter", "--lora-modules", "--lora-paths")
LIMITS_OF_OTHERS = ("max_loras", "max_cpu_loras", "max_lora_rank", "max_loras_per_batch", "max_loaded_loras")
MODULE_FORMS = (("name", "path"), ("lora_name", "lora_path"))


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
    base: Annotated[str | None, typer.Argument(help="embedded (default), a local folder, or a hub id.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="What requests call the base.")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"] | None, typer.Option(help="Where the model runs.")] = None,
    dtype: Annotated[
        Literal["auto", "bf16", "fp32"] | None,
        typer.Option(help="Number format of the base: auto is bf16 on a GPU, fp32 on a CPU."),
    ] = None,
    quantization: Annotated[
        Literal["int8", "nf4"] | None, typer.Option(help="Keep the base's linears in 8 or 4 bits.")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest context in tokens (default: the base's).")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (default 127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 picks a free one (default 8000).")] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="A key that admits a request; repeatable.")
    ] = None,
    insecure_no_auth: Annotated[
        bool | None, typer.Option("--insecure-no-auth", help="Listen beyond this machine without a key.")
    ] = None,
    cors_allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Whose web pages may ask: https://HOST, or * for all; repeatable."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name this server is called by: api.example.com; repeatable."),
    ] = None,
    root_path: Annotated[
        str | None, typer.Option(metavar="PATH", help="Path below which a proxy serves this: /models.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(*ADAPTER_FLAGS, metavar="NAME=PATH", help="An adapter folder; repeatable.")
    ] = None,
    adapter_dir: Annotated[Path | None, typer.Option(help="Folder whose sub-folders are adapters.")] = None,
    adapter_rescan_seconds: Annotated[
        float | None, typer.Option(help="Time between looks at --adapter-dir; 0 looks at start only (default 10).")
    ] = None,
    allow_source: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="Where adapters may be fetched from: hf://ORG, s3://BUCKET; repeatable."),
    ] = None,
    resolver: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Where an adapter that is not here is fetched from: hf://ORG/{name}."),
    ] = None,
    adapter_memory_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for resident adapters (default 4GiB).")
    ] = None,
    adapter_wait_seconds: Annotated[
        float | None, typer.Option(help="Longest wait of a request for memory for its adapters (default 30).")
    ] = None,
    max_adapter_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest adapter to accept (default 1GiB).")
    ] = None,
    keep_versions: Annotated[int | None, typer.Option(help="Versions kept of each adapter (default 8).")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Most requests running at once (default 64).")] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Most requests waiting; then 429 (default 256).")] = None,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option("--max-batch-tokens", "--max-num-batched-tokens", help="Most tokens in one step (default 512)."),
    ] = None,
    max_step_ranks: Annotated[
        int | None, typer.Option(help="Most ranks of distinct adapters in one step (default 4096: 64 of rank 64).")
    ] = None,
    kv_cache_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for the KV cache (default 1GiB).")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens in a block of the KV cache (default 16).")] = None,
    prefix_cache: Annotated[
        bool | None,
        typer.Option(
            "--prefix-cache/--no-prefix-cache", help="Compute what prompts begin with in common once (default on)."
        ),
    ] = None,
    max_body_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest JSON body (default 32MiB).")
    ] = None,
    body_memory_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for JSON bodies in all; then 429 (default 256MiB).")
    ] = None,
    tokenizer_threads: Annotated[
        int | None, typer.Option(help="Threads for large bodies and long prompts (default 2).")
    ] = None,
    max_connections: Annotated[
        int | None, typer.Option(help="Most connections (default 3/4 of the open files allowed, 4096 at most).")
    ] = None,
    keep_alive_seconds: Annotated[
        float | None, typer.Option(help="Time a connection may rest between requests (default 120).")
    ] = None,
    head_seconds: Annotated[
        float | None, typer.Option(help="Time a request's line and headers may take to come (default 20).")
    ] = None,
    stall_seconds: Annotated[
        float | None, typer.Option(help="Time a client may rest while sending its body or reading (default 30).")
    ] = None,
    min_bytes_per_second: Annotated[
        int | None, typer.Option(help="Least it sends or reads, such rests aside (default 256).")
    ] = None,
    max_unread_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most of a stream that may lie unread (default 4MiB).")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings, named as the flags.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Uploaded adapters.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Downloads and compiled code.")] = None,
    drain_seconds: Annotated[float | None, typer.Option(help="Time to end requests at shutdown (default 30).")] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None, typer.Option(help="Least level logged (default info).")
    ] = None,
    log_json: Annotated[bool | None, typer.Option("--log-json", help="Log one JSON object a line.")] = None,
    model: Annotated[str | None, typer.Option("--model", "--model-path", help="Same as BASE.")] = None,
    enable_lora: Annotated[bool | None, typer.Option("--enable-lora", help="Accepted; always on here.")] = None,
    max_loras: Annotated[int | None, typer.Option(help="Accepted; no such limit here.")] = None,
    max_cpu_loras: Annotated[int | None, typer.Option(help="Accepted; no such limit here.")] = None,
    max_lora_rank: Annotated[int | None, typer.Option(help="Accepted; no such limit here.")] = None,
    max_loras_per_batch: Annotated[int | None, typer.Option(help="Accepted; no such limit here.")] = None,
    max_loaded_loras: Annotated[int | None, typer.Option(help="Accepted; no such limit here.")] = None,
) -> None:
    """Serve a base model and its adapters.

    Each flag is also an environment variable (SWAPLORA_PORT) and a key of the --config file (port); flags win.
    """
    given = {name: value for name, value in ctx.params.items() if value not in (None, [], ())}
    settings = read_settings(_in_our_terms(given))
    # OpenMP's runtime reads this when torch loads it: threads that wait spin briefly, then leave their core to HTTP
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    from swaplora_server.serve import StartError, run

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
