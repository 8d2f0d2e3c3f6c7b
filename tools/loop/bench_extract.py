"""`make bench-extract`: how much of a full fine-tune is left in adapters extracted from it, rank by rank.

Every weight of the embedded base is trained on a demo task, with the examples and the steps of the task's recipe. What
`swaplora extract` makes of that model at each rank, the base and the model itself are then asked the task's held-out
examples by `swaplora evaluate`. Prints the table as Markdown; half an hour on one thread.
"""

import argparse
import json
import math
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import AutoTokenizer

from make_data import NUM_EXAMPLES, SEED, line
from server_process import process
from swaplora_adapters.derive.lowrank import LowRank, at_most
from swaplora_adapters.derive.whole_models.extract import extract_adapter
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.train.base_model import load_base
from swaplora_adapters.train.batches import steps_of
from swaplora_adapters.train.data import read_data, split
from swaplora_adapters.train.encode import Encoder, Limit, encode_all
from swaplora_adapters.train.recipe import Recipe
from swaplora_adapters.train.run import learn
from swaplora_server.bench.machine import measure_machine
from swaplora_server.bench.table import machine_line
from swaplora_server.client import Client
from swaplora_server.config import Settings
from swaplora_server.embedded import ensure_embedded_base
from task import Task
from tasks import TASKS

RECIPES = Path(__file__).parents[2] / "demo" / "recipes"
OTHERS = ("*norm*", "*embed_tokens*")  # what a full fine-tune changes and no adapter holds
LEARNING_RATE, MAX_TOKENS = 1e-4, 512
console = Console(soft_wrap=True)


def fine_tune(base: Path, task: Task, scratch: Path, learning_rate: float) -> Path:
    """The folder of the base with all its weights trained, in fp32."""
    choices = tomllib.loads((RECIPES / f"{task.name}.toml").read_text())
    names = ("epochs", "seed", "holdout")
    recipe = Recipe(**{name: choices[name] for name in names}, learning_rate=learning_rate, checkpoint_steps=1 << 20)
    examples = scratch / "examples.jsonl"
    examples.write_text("".join(map(line, task.train(NUM_EXAMPLES, SEED))), encoding="utf-8")
    data = read_data(examples)
    model, tokenizer = load_base(base, recipe, torch.device("cpu")), AutoTokenizer.from_pretrained(base)
    encoder = Encoder(tokenizer, {tokenizer.eos_token_id})
    learnt, _ = encode_all(
        encoder, data, split(data, recipe.holdout_share or 0.0, recipe.seed).learnt, Limit(MAX_TOKENS, False)
    )
    steps = steps_of(learnt, recipe.batch_size, recipe.epochs, recipe.seed)

    def progress(done: int, total: int, loss: float | None, _held_out: float | None) -> None:
        if done % 10 == 0:
            console.print(f"step {done} of {total}, loss {loss or math.nan:.3f}")

    learn(model, steps, [], recipe, scratch / "run", progress, pad_id=tokenizer.pad_token_id, only_learnt=True)
    for saved in (model, tokenizer):
        saved.save_pretrained(scratch / "full")
    return scratch / "full"


def score(client: Client, model: str, items: Sequence[Any], max_tokens: int) -> str:
    """Its share of right answers with the 95 % interval, as `swaplora evaluate` has them."""
    found = client.wait_for_evaluation(client.begin_evaluation(items, [model], max_tokens=max_tokens)["id"])
    metric = found["results"][0]["metrics"]["exact_match"]
    return f"{metric['mean']:.2f} ({metric['low']:.3f} to {metric['high']:.3f})"


def row(name: str, size: int | None, energy: float | None, accuracy: str) -> None:
    """A line of the table, once it is known."""
    kept, megabytes = "" if energy is None else f"{energy:.1%}", "" if size is None else f"{size / 1e6:.0f} MB"
    console.print(f"| {name} | {accuracy} | {kept} | {megabytes} |")


def energy_of(parts: Sequence[LowRank]) -> float:
    """The share of all squared singular values of all linears that is kept."""
    return 1 - sum(part.lost for part in parts) / sum(part.total for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=[*TASKS], default="intent")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    items = [{"messages": one.messages, "answer": one.answer} for one in task.held_out()]
    transformers.logging.set_verbosity_error()
    base = ensure_embedded_base(Settings().cache_dir, console.print)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        full = fine_tune(base, task, scratch, arguments.learning_rate)
        console.print("| | accuracy | energy | file |\n| --- | --- | --- | --- |")
        weights = (full / "model.safetensors").stat().st_size
        with process(full, scratch / "data-full", "--dtype", "fp32", "--served-model-name", "full") as (_, http):
            row("all weights", weights, None, score(Client(str(http.base_url)), "full", items, task.max_tokens))
        with process(base, scratch / "data", "--dtype", "fp32", "--served-model-name", "base") as (_, http):
            client = Client(str(http.base_url))
            row("base", None, None, score(client, "base", items, task.max_tokens))
            for rank in arguments.ranks:
                out = scratch / f"rank{rank}"
                found = extract_adapter(base, full, out, at_most(rank), OTHERS)
                with (out / CONFIG_FILE).open("rb") as config, (out / WEIGHTS_FILE).open("rb") as file:
                    client.put_adapter("extracted", config, file)
                size = (out / WEIGHTS_FILE).stat().st_size
                accuracy = score(client, "extracted", items, task.max_tokens)
                row(f"rank {rank}", size, energy_of([*found.modules.values()]), accuracy)
        moved = {name: part for name, part in found.left_out.items() if "norm" not in name}
        console.print(f"left out: {json.dumps(moved)}, norms by at most {max(found.left_out.values()):.2%}")
    console.print(machine_line(measure_machine()))


if __name__ == "__main__":
    main()
