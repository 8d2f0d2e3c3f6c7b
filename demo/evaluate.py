"""Score base and demo adapters on the held-out prompts through a running server's chat endpoint.

`python demo/evaluate.py --url http://127.0.0.1:8000 [--write-cards] [NAME...]`
"""

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from cards import Results, Sample, write_results
from task import Example, Task
from tasks import TASKS

FOLDER = Path(__file__).parent
NUM_SAMPLES = 2
TIMEOUT_SECONDS = 600.0


async def find_base(client: httpx.AsyncClient) -> str:
    """The id of the model without a parent. Raises httpx.HTTPStatusError when the server refuses to list its models."""
    response = await client.get("/v1/models")
    response.raise_for_status()
    return str(next(model["id"] for model in response.json()["data"] if model["parent"] is None))


async def ask(client: httpx.AsyncClient, turn: asyncio.Semaphore, model: str, example: Example, max_tokens: int) -> str:
    """The model's greedy answer to one example. Raises httpx.HTTPStatusError when the server refuses."""
    body = {"model": model, "messages": example.messages, "temperature": 0, "max_tokens": max_tokens}
    async with turn:
        response = await client.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    return str(response.json()["choices"][0]["message"]["content"])


async def measure(client: httpx.AsyncClient, turn: asyncio.Semaphore, base: str, task: Task) -> Results:
    """Ask base and adapter all held-out prompts at once, as mixed traffic."""
    examples = task.held_out()
    asked = [(model, example) for example in examples for model in (base, task.name)]
    answers = await asyncio.gather(*(ask(client, turn, model, example, task.max_tokens) for model, example in asked))
    samples = [
        Sample(example, base_answer, adapter_answer)
        for example, base_answer, adapter_answer in zip(examples, answers[::2], answers[1::2], strict=True)
    ]
    return Results(
        total=len(samples),
        base_correct=sum(task.is_correct(sample.example.answer, sample.base_answer) for sample in samples),
        adapter_correct=sum(task.is_correct(sample.example.answer, sample.adapter_answer) for sample in samples),
        measured_by="asked over the server's HTTP API",
        samples=samples[:NUM_SAMPLES],
    )


async def measure_all(url: str, tasks: list[Task], concurrency: int) -> dict[str, Results]:
    """Results by task name, with up to `concurrency` requests in flight."""
    turn = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS) as client:
        base = await find_base(client)
        return {task.name: await measure(client, turn, base, task) for task in tasks}


def as_table(results: dict[str, Results]) -> Table:
    """The scores for reading."""
    table = Table("adapter", "held-out prompts", "base", "adapter")
    for name, scores in results.items():
        table.add_row(name, str(scores.total), *(f"{share:.0%}" for share in (scores.base_share, scores.adapter_share)))
    return table


def as_json(results: dict[str, Results]) -> dict[str, Any]:
    """The scores for programs."""
    return {
        name: {"total": scores.total, "base": scores.base_share, "adapter": scores.adapter_share}
        for name, scores in results.items()
    }


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Adapters to score; all when none is named.")] = None,
    url: Annotated[str, typer.Option(help="The server's address.")] = "http://127.0.0.1:8000",
    concurrency: Annotated[int, typer.Option(help="Requests in flight.", min=1)] = 16,
    write_cards: Annotated[bool, typer.Option("--write-cards", help="Put the results into the cards.")] = False,
) -> None:
    """Score base and demo adapters on held-out prompts over HTTP."""
    tasks = [TASKS[name] for name in names or TASKS]
    results = asyncio.run(measure_all(url, tasks, concurrency))
    if write_cards:
        for task in tasks:
            write_results(FOLDER / task.name, task, results[task.name])
    Console(stderr=True).print(as_table(results))
    typer.echo(json.dumps(as_json(results)))


if __name__ == "__main__":
    typer.run(main)
