"""Write the demo adapters' examples: `python demo/make_data.py FOLDER`, a file of JSON lines for each of the tasks."""

import json
from pathlib import Path
from typing import Annotated

import typer

from task import Example
from tasks import TASKS

NUM_EXAMPLES, SEED = 960, 7


def line(example: Example) -> str:
    """As `swaplora train` reads it."""
    answer = {"role": "assistant", "content": example.answer}
    return json.dumps({"messages": [*example.messages, answer]}) + "\n"


def main(folder: Annotated[Path, typer.Argument(help="Where they are written.")]) -> None:
    """Write what each of the demo adapters learns from."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in TASKS.items():
        (folder / f"{name}.jsonl").write_text("".join(map(line, task.train(NUM_EXAMPLES, SEED))), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
