"""`make bench-evaluation`: what an evaluation of 200 prompts by 4 versions costs the live stream beside it.

One stream of the base after another, alone and beside the evaluation in turns, with the same prompts and so the same
answers, or nothing is measured. A request's time per token is the mean of the gaps between its tokens.
"""

import argparse
import asyncio
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from bench import console, machine, make_adapters
from bench_life import stream
from server_process import process
from swaplora_server.bench.report import quantiles
from swaplora_server.client import Client
from swaplora_server.config import Settings
from swaplora_server.embedded import ensure_embedded_base

NUM_PROMPTS, NUM_VERSIONS, PROMPT_WORDS, ANSWER_TOKENS = 200, 4, 40, 16
LIVE_TOKENS = 64
WORDS = ("order", "parcel", "blue", "late", "where", "please", "lamp", "seven", "refund", "is", "my", "the", "again")


Times = Callable[[list[list[float]]], list[float]]


def task(seed: int) -> list[dict[str, str]]:
    """Prompts that no other round has, so that none is found in the cache."""
    rng = random.Random(seed)
    prompts = (" ".join(rng.choices(WORDS, k=PROMPT_WORDS)) for _ in range(NUM_PROMPTS))
    return [{"prompt": prompt, "answer": "none"} for prompt in prompts]


async def live(url: str, seconds: float) -> tuple[list[list[int]], list[list[float]]]:
    """Answers and gaps of one stream after the other, until that time is over."""
    answers, gaps = [], []
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        ends = time.monotonic() + seconds
        for number in itertools.count():
            ids, found = await stream(client, number, LIVE_TOKENS, 0)
            answers.append(ids)
            gaps.append(found)
            if time.monotonic() > ends:
                return answers, gaps
    raise AssertionError


@contextmanager
def evaluating(client: Client, seed: int, answered: list[int]) -> Iterator[None]:
    """Beside the block an evaluation runs; `answered` learns how many answers it has come to meanwhile."""
    names = [f"a{number}" for number in range(NUM_VERSIONS)]
    begun = client.begin_evaluation(task(seed), names, max_tokens=ANSWER_TOKENS)["id"]
    while not client.evaluation(begun)["progress"]["done"]:
        time.sleep(0.1)
    before = client.evaluation(begun)["progress"]["done"]
    yield
    told = client.evaluation(begun)
    if told["ended"] is not None:
        raise SystemExit("the evaluation ended before the streams did: nothing was beside the last of them")
    answered.append(told["progress"]["done"] - before)
    client.cancel_evaluation(begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=25, help="of streams in each half of a round")
    arguments = parser.parse_args()
    base = ensure_embedded_base(Settings().cache_dir, console.print)
    found: dict[str, list[list[float]]] = {"alone": [], "beside": []}
    answered: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        make_adapters(base, Path(folder) / "adapters", NUM_VERSIONS)
        flags = ["--served-model-name", "base", "--adapter-dir", f"{folder}/adapters", "--no-prefix-cache"]
        with process(base, Path(folder) / "data", *flags) as (_, http), Client(str(http.base_url)) as client:
            url = str(http.base_url)
            with evaluating(client, -1, []):  # nothing is measured that is done for the first time
                control, _ = asyncio.run(live(url, 1))
            for number in range(arguments.rounds):
                answers, gaps = asyncio.run(live(url, arguments.seconds))
                found["alone"] += gaps
                with evaluating(client, number, answered):
                    others, gaps = asyncio.run(live(url, arguments.seconds))
                found["beside"] += gaps
                control = max(control, answers, others, key=len)
                if any(each != control[: len(each)] for each in (answers, others)):
                    raise SystemExit("streams beside an evaluation differ from those alone: not measured")
    report(found)
    told = f"{sum(answered)} answers of evaluations in {arguments.rounds * arguments.seconds:g} s ({machine()})"
    console.print(told, soft_wrap=True)


def report(found: dict[str, list[list[float]]]) -> None:
    """Of requests their time per token, and of all tokens the gaps before them."""
    kinds: dict[str, Times] = {
        "time per token": lambda gaps: [sum(each) / len(each) for each in gaps],
        "gap": lambda gaps: [gap for each in gaps for gap in each],
    }
    for kind, times in kinds.items():
        alone, beside = (quantiles(times(found[where])) or {} for where in ("alone", "beside"))
        for percent in ("p50", "p99"):
            console.print(
                f"{kind} {percent}: alone {alone[percent]:.1f} ms, beside {beside[percent]:.1f} ms, "
                f"{beside[percent] / alone[percent]:.2f} of alone ({len(times(found['beside']))} measured beside)",
                soft_wrap=True,
            )


if __name__ == "__main__":
    main()
