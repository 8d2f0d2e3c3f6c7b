"""Sends requests in a closed or an open loop, as was asked for, and gathers their answers."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from swaplora_server.bench.answer import Answer
from swaplora_server.bench.connection import Endpoint, ask
from swaplora_server.bench.options import Options
from swaplora_server.bench.workload import PromptRequest, arrival_times, make_requests


class WarmupError(RuntimeError):
    """A request of the warm-up failed."""


@dataclass(frozen=True, slots=True)
class Load:
    """What was sent and what came of it: `seconds` from the first request to the end of the last answer, and how much
    processor time of them the generator itself took."""

    answers: Sequence[Answer]
    seconds: float
    cpu_seconds: float


async def drive(options: Options, endpoint: Endpoint) -> Load:
    """Warm up, then run the load. Raises WarmupError; a request of the load itself that fails is an answer too."""
    requests = make_requests(options, options.requests, "load")
    await _warm_up(options, endpoint)
    began, cpu_began = time.perf_counter(), time.process_time()
    if options.rate is None:
        answers = await closed_loop(endpoint, requests, options.workers)
    else:
        due = arrival_times(len(requests), options.rate, options.burstiness or 1.0, Random(f"{options.seed} arrivals"))
        answers = await open_loop(endpoint, requests, due)
    return Load(answers, time.perf_counter() - began, time.process_time() - cpu_began)


async def closed_loop(endpoint: Endpoint, requests: Sequence[PromptRequest], concurrency: int) -> list[Answer]:
    """A closed loop: keep `concurrency` requests in flight until all are answered, in the order of sending."""
    waiting, answers = iter(requests), []

    async def work() -> None:
        for request in waiting:
            answers.append(Answer(request, time.perf_counter()))
            await ask(endpoint, answers[-1])

    async with asyncio.TaskGroup() as workers:
        for _ in range(min(concurrency, len(requests))):
            workers.create_task(work())
    return answers


async def open_loop(endpoint: Endpoint, requests: Sequence[PromptRequest], due: Sequence[float]) -> list[Answer]:
    """An open loop: send each request when it is due, in seconds from now, whatever has become of those before it."""
    began = time.perf_counter()
    answers = [Answer(request, began + offset) for request, offset in zip(requests, due, strict=True)]
    async with asyncio.TaskGroup() as sent:
        for answer in answers:
            await asyncio.sleep(answer.began - time.perf_counter())
            sent.create_task(ask(endpoint, answer))
    return answers


async def _warm_up(options: Options, endpoint: Endpoint) -> None:
    requests = make_requests(options, options.warmup, "warm-up")
    for answer in await closed_loop(endpoint, requests, options.workers):
        if answer.failure:
            raise WarmupError(f"the warm-up failed: {answer.failure}")
