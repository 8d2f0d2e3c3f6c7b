"""`make bench-formats`: what grammars that are made to be dear cost a stream that has none.

A server on the embedded base, one stream of it that is watched, and a sender in a process of its own. The sender asks
the same prompts at the same rate with no format and with each hostile one, no two of them alike: so what the prompts
cost is in both, and the difference is the grammars'.
"""

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import count
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from bench import console, machine
from server_process import process
from swaplora_server.bench.report import quantiles
from swaplora_server.config import Settings
from swaplora_server.embedded import ensure_embedded_base

SERVED = ("--served-model-name", "base")
STREAM_TOKENS, SETTLING, ANSWER_TOKENS = 120, 8, 8
SECONDS_APART = 0.25  # of two requests of the sender
Format = Callable[[int], Mapping[str, Any]]


def json_schema(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def nested_any_of(number: int) -> Mapping[str, Any]:
    """Two ways at each of eight levels, that differ only at the innermost."""
    schema: dict[str, Any] = {"const": f"end{number}"}
    for level in range(8):
        more = {"a": schema, f"b{level}": {"type": "integer"}}
        schema = {"anyOf": [{"type": "object", "properties": properties} for properties in ({"a": schema}, more)]}
    return json_schema(schema)


def recursive(number: int) -> Mapping[str, Any]:
    node = {"type": "object", "properties": {"id": {"const": number}, "k": {"type": "array", "items": {"$ref": "#"}}}}
    return json_schema(node | {"anyOf": [{"required": ["id"]}, {"required": ["k"]}]})


def alternatives(number: int) -> Mapping[str, Any]:
    kinds = [{"type": "object", "properties": {f"p{number}_{i}": {"type": "string"}}} for i in range(1500)]
    return json_schema({"anyOf": kinds})


def long_enum(number: int) -> Mapping[str, Any]:
    return json_schema({"enum": [f"value {number} {i}" for i in range(10_000)]})


def choices(number: int) -> Mapping[str, Any]:
    return {"structured_outputs": {"choice": [f"choice {number} {i}" for i in range(10_000)]}}


def long_texts(num: int) -> Format:
    """A schema of `num` members, half a KiB each."""

    def schema(number: int) -> Mapping[str, Any]:
        member = {"type": "string", "description": "x" * 560}
        return json_schema({"type": "object", "properties": {f"n{number}_{i}": member for i in range(num)}})

    return schema


def deep(number: int) -> Mapping[str, Any]:
    schema: dict[str, Any] = {"const": number}
    for _ in range(60):
        schema = {"type": "object", "properties": {"a" * 200: schema}, "required": ["a" * 200]}
    return json_schema(schema)


def repeats(number: int) -> Mapping[str, Any]:
    return {"structured_outputs": {"regex": f"((a{{1,60}}|b{{1,60}}){{1,60}}x{number})"}}


def chained_rules(number: int) -> Mapping[str, Any]:
    rules = [f'root ::= r0 | "n{number}"'] + [f'r{i} ::= "a" r{i + 1} | "b" r{i + 1}' for i in range(2000)]
    return {"structured_outputs": {"grammar": "\n".join([*rules, 'r2000 ::= "end"'])}}


def many_tags(number: int) -> Mapping[str, Any]:
    tags = [
        {"type": "tag", "begin": f"<f{number}_{i}>", "content": {"type": "any_text"}, "end": f"</f{i}>"}
        for i in range(80)
    ]
    triggered = {"type": "triggered_tags", "triggers": ["<f"], "tags": tags}
    return {"structured_outputs": {"structural_tag": json.dumps({"type": "structural_tag", "format": triggered})}}


HOSTILE: Mapping[str, Format] = {
    "nested anyOf": nested_any_of,
    "recursive": recursive,
    "1,500 alternatives": alternatives,
    "enum of 10,000": long_enum,
    "10,000 choices": choices,
    "1 MiB": long_texts(1700),
    "240 KiB": long_texts(400),
    "deep": deep,
    "regex of repeats": repeats,
    "2,000 rules (GBNF)": chained_rules,
    "80 tags": many_tags,
}


def bodies(format_: Format | None, salt: int, num: int) -> list[bytes]:
    """Requests as they are sent, of one prompt that is soon in the prefix cache."""
    plain = {"model": "base", "messages": [{"role": "user", "content": "Say something."}], "temperature": 1}
    plain |= {"max_tokens": ANSWER_TOKENS}
    return [json.dumps(plain | dict(format_(salt + i) if format_ else {})).encode() for i in range(num)]


class Sender:
    """A process of its own, that asks while it is told to, however long its requests take."""

    def __init__(self, url: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._jobs: multiprocessing.Queue[list[bytes] | None] = context.Queue()
        self._statuses: multiprocessing.Queue[list[int]] = context.Queue()
        self._has_begun, self._is_over = context.Event(), context.Event()
        arguments = (url, self._jobs, self._has_begun, self._is_over, self._statuses)
        self._process = context.Process(target=send_all, args=arguments)
        self._process.start()

    @contextmanager
    def sending(self, requests: list[bytes], seen: list[int]) -> Iterator[None]:
        """Whatever runs in the block runs beside it; `seen` has the answers' statuses afterwards."""
        self._is_over.clear()
        self._jobs.put(requests)
        self._has_begun.wait()
        self._has_begun.clear()
        yield
        self._is_over.set()
        seen += self._statuses.get(timeout=120)

    def close(self) -> None:
        self._jobs.put(None)
        self._process.join()


def send_all(
    url: str,
    jobs: "multiprocessing.Queue[list[bytes] | None]",
    has_begun: Event,
    is_over: Event,
    statuses: "multiprocessing.Queue[list[int]]",
) -> None:
    """The sender's process."""
    with httpx.Client(base_url=url, timeout=60, limits=httpx.Limits(max_connections=64)) as client:
        while (requests := jobs.get()) is not None:
            has_begun.set()
            statuses.put(send(client, requests, is_over))


def send(client: httpx.Client, requests: list[bytes], is_over: Event) -> list[int]:
    """Statuses: a request each `SECONDS_APART`, whether or not the ones before were answered."""
    seen: list[int] = []

    def one(body: bytes) -> None:
        answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        seen.append(answer.status_code)

    threads = []
    for body in requests:
        if is_over.wait(SECONDS_APART):
            break
        threads.append(threading.Thread(target=one, args=(body,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return seen


def watch(url: str) -> list[float]:
    """Seconds between the tokens of one stream of the base."""
    body = {"model": "base", "prompt": "Once upon a time", "max_tokens": STREAM_TOKENS, "temperature": 0}
    stamps = []
    with httpx.Client(base_url=url, timeout=600) as client:
        extra = {"stream": True, "ignore_eos": True, "return_token_ids": True}
        with client.stream("POST", "/v1/completions", json=body | extra) as answer:
            stamps = [time.perf_counter() for line in answer.iter_lines() if line.startswith("data: {")]
    return [after - before for before, after in zip(stamps[SETTLING:], stamps[SETTLING + 1 :], strict=False)]


def measure(url: str, sender: Sender, label: str, format_: Format | None, salts: Iterator[int], rounds: int) -> None:
    found: list[list[float]] = []
    statuses: list[int] = []
    for _ in range(rounds):
        requests = bodies(format_, next(salts) * 1000, 40)
        with sender.sending(requests, statuses):
            found.append(watch(url))
        time.sleep(1)
    gaps = quantiles(gap for run in found for gap in run) or {}
    gaps["max_median"] = median(max(run) for run in found) * 1e3
    told = {str(code): statuses.count(code) for code in sorted(set(statuses))}
    console.print(
        f"{label:20} gap p50 {gaps['p50']:5.1f}  p99 {gaps['p99']:5.1f}  longest {gaps['max']:5.1f} "
        f"(median of runs {gaps['max_median']:5.1f}) ms; answers {told}",
        soft_wrap=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="streams that are watched beside each format")
    parser.add_argument("--only", nargs="*", default=list(HOSTILE), choices=list(HOSTILE), metavar="FORMAT")
    arguments = parser.parse_args()
    base = ensure_embedded_base(Settings().cache_dir, console.print)
    salts = count(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        process(base, Path(folder), *SERVED) as (_, client),
        closing(Sender(str(client.base_url))) as sender,
    ):
        url = str(client.base_url)
        with sender.sending(bodies(None, 0, 8), []):  # nothing is measured that is done for the first time
            watch(url)
        alone = quantiles(gap for _ in range(arguments.rounds) for gap in watch(url)) or {}
        console.print(
            f"{'alone':20} gap p50 {alone['p50']:5.1f}  p99 {alone['p99']:5.1f}  longest {alone['max']:5.1f} ms"
        )
        for label in arguments.only:
            measure(url, sender, "no format", None, salts, arguments.rounds)
            measure(url, sender, label, HOSTILE[label], salts, arguments.rounds)
    console.print(machine())


if __name__ == "__main__":
    main()
