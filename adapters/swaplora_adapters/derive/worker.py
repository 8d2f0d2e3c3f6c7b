"""The process that `derive.process` starts: reads a job on stdin, does it, answers on the descriptor it is told. JSON.

It ends with the process that started it, however that ends: stdin is closed then, and not before.
An error that is nobody's fault ends it with a traceback on stderr, which goes to the server's log.
"""

import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from swaplora_adapters.config.parse import read_spec
from swaplora_adapters.config.spec import AdapterSpec
from swaplora_adapters.derive.compose import Ingredient, compose
from swaplora_adapters.derive.lowrank import LowRank, relative_error
from swaplora_adapters.derive.process import answer_of, bound_this_process
from swaplora_adapters.derive.recipe import Recipe, require_deltas
from swaplora_adapters.derive.write import write_adapter
from swaplora_adapters.errors import AdapterError
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.fit.base import LayerShapes, LinearShape
from swaplora_adapters.weights.load import load_weights
from swaplora_adapters.weights.served import AdapterWeights


def main() -> None:
    """One job."""
    logging.basicConfig(level=logging.ERROR)  # what a library remarks on is nothing for the server's log
    torch.set_num_threads(1)  # and so the same result each time
    bound_this_process()
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        answer = {"result": _JOBS[request["job"]](**request["arguments"])}
    except AdapterError as error:
        answer = answer_of(error)
    with open(int(sys.argv[1]), "w", encoding="utf-8") as file:
        json.dump(answer, file)


def _end_with_stdin() -> None:
    os.read(sys.stdin.fileno(), 1)  # nothing ever comes
    os._exit(1)


def _compose(
    folders: list[str],
    scales: list[float],
    recipe: dict[str, Any],
    out: str,
    shapes: dict[str, list[int]],
    base_model: str,
    max_bytes: int,
) -> dict[str, Any]:
    """Combine the adapters in `folders` and write the result's two files into `out`."""
    linears = _shapes(shapes)
    ingredients = [Ingredient(_weights(Path(f), linears), s) for f, s in zip(folders, scales, strict=True)]
    modules = compose(ingredients, Recipe(**recipe), linears)
    is_transposed = any(_spec(Path(folder)).fan_in_fan_out for folder in folders)
    write_adapter(Path(out), modules, base_model=base_model, fan_in_fan_out=is_transposed, max_bytes=max_bytes)
    return _errors(modules)


def _convert(
    folder: str, energy: float, shapes: dict[str, list[int]], base_model: str, max_bytes: int
) -> dict[str, Any]:
    """Convert the adapter in `folder`, and write the result's two files in the place of its own."""
    from swaplora_adapters.derive.convert import convert  # brings PEFT and transformers, which sums do without

    config, weights = Path(folder) / CONFIG_FILE, Path(folder) / WEIGHTS_FILE
    converted = convert(config, weights, _shapes(shapes), energy)
    spec = converted.source.spec
    for path in (config, weights):
        path.unlink()
    write_adapter(
        Path(folder),
        converted.modules,
        base_model=spec.base_model_name_or_path or base_model,
        fan_in_fan_out=spec.fan_in_fan_out,
        max_bytes=max_bytes,
    )
    return {"from_kind": converted.source.kind_name} | _errors(converted.modules)


def _count_intruders(folder: str, base: str, shapes: dict[str, list[int]]) -> dict[str, int | None]:
    """By module, of the adapter in `folder`."""
    from swaplora_adapters.derive.intruders import count_intruders  # brings transformers

    return count_intruders(_weights(Path(folder), _shapes(shapes)), base)


_JOBS: Mapping[str, Callable[..., Any]] = {
    "compose": _compose,
    "convert": _convert,
    "count_intruders": _count_intruders,
}


def _shapes(shapes: Mapping[str, list[int]]) -> dict[str, LinearShape]:
    return {path: LinearShape(*shape) for path, shape in shapes.items()}


def _spec(folder: Path) -> AdapterSpec:
    return read_spec(folder / CONFIG_FILE)


def _weights(folder: Path, shapes: Mapping[str, LinearShape]) -> AdapterWeights:
    """In float32, whatever the server serves in. Raises UnsupportedAdapterError for what is not all deltas."""
    require_deltas(_spec(folder))
    files, layers = (folder / CONFIG_FILE, folder / WEIGHTS_FILE), LayerShapes(shapes)
    return load_weights("", *files, layers, torch.float32, torch.device("cpu"))


def _errors(modules: Mapping[str, LowRank]) -> dict[str, Any]:
    """How far the result is from what was asked for, of all and where it is worst."""
    worst = max(modules, key=lambda path: modules[path].error)
    overall = relative_error(modules.values())
    return {"error": {"overall": overall, "max": modules[worst].error, "max_module": worst}}


if __name__ == "__main__":
    main()
