"""A program that serves nobody over HTTP: it makes a service, generates with it, and prints what came as JSON.

`python without_http.py DATA_DIR BASE ADAPTER CACHE_DIR PROMPTS`; the last, as JSON: one that fits, and one too long.
Every import of what serves HTTP fails in it, so no test may import it.
"""

import asyncio
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

FORBIDDEN = ("fastapi", "starlette", "uvicorn", "swaplora_server.http")


class _NoHttp:
    """An import hook that has none of the forbidden modules."""

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> None:
        if any(name == module or name.startswith(f"{module}.") for module in FORBIDDEN):
            raise ImportError(f"{name} is not to be imported here")


sys.meta_path.insert(0, _NoHttp())

from swaplora_server.config import Settings  # noqa: E402
from swaplora_server.engine.request import SamplingParams  # noqa: E402
from swaplora_server.service.adapter_mix import MixTerm  # noqa: E402
from swaplora_server.service.errors import RequestError  # noqa: E402
from swaplora_server.service.generating.task import GenerationTask  # noqa: E402
from swaplora_server.service.generation import generate  # noqa: E402
from swaplora_server.service.service import Service  # noqa: E402


async def ask(service: Service, model: str, prompt: list[int], **fields: Any) -> dict[str, Any]:
    """What a greedy generation gave, or why it could not be had."""

    async def encode() -> list[list[int]]:
        return [prompt]

    task = GenerationTask(
        model=model, encode=encode, sampling=SamplingParams(1, temperature=0.0), max_tokens=6, ignore_eos=True, **fields
    )
    try:
        generation = await generate(service, task)
    except RequestError as error:
        return {"code": error.code, "param": error.param}
    token_ids: list[int | None] = []
    running = asdict(service.engine.snapshot())
    while generation.outcome is None:
        await generation.arrival()
        token_ids += [piece.token_id for piece in generation.arrived()]
    versions = [f"{record.name}@{record.version}" for record in generation.records]
    return {"token_ids": token_ids, "versions": versions, "during": running, "outcome": generation.outcome}


async def use(service: Service, prompt: list[int], too_long: list[int]) -> dict[str, Any]:
    text = partial(service.tokenizer.encode_all, ["hello"], lambda _number: "prompt", add_special_tokens=False)
    return {
        "base": await ask(service, "base", prompt),
        "adapter": await ask(service, "own", prompt),
        "sum": await ask(service, "base", prompt, adapters=(MixTerm("own", 0.5),)),
        "unknown": await ask(service, "nobody", prompt),
        "too long": await ask(service, "base", too_long),
        "too many": await ask(service, "base", prompt, n=10**6),
        "text": await text(),
    }


def main(data_dir: str, base: str, adapter: str, cache_dir: str, prompts: str) -> None:
    service = Service(
        Settings(
            base=base,
            served_model_name="base",
            adapter=[f"own={adapter}"],
            data_dir=Path(data_dir),
            cache_dir=Path(cache_dir),
            dtype="fp32",
            device="cpu",
            kv_cache_bytes=4 << 20,
            max_model_len=512,
            log_level="warning",
        )
    )
    service.start(lambda _step: None)
    try:
        said = asyncio.run(use(service, *json.loads(prompts)))
        said["after"] = asdict(service.engine.snapshot()) | {"is_at_rest": service.engine.snapshot().is_at_rest}
        service.registry.check_integrity()
    finally:
        service.stop()
    said["imported"] = sorted(set(FORBIDDEN) & sys.modules.keys())
    print(json.dumps(said))  # noqa: T201 - the test reads it


if __name__ == "__main__":
    main(*sys.argv[1:])
