"""Long streams of all adapters at once, what each should say, and requests that go on while something happens."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx

from serving import Running

NUM_ADAPTERS = 8
NAMES = [f"s{number}" for number in range(NUM_ADAPTERS)]
LONG = 300  # tokens


def chat(name: str, **fields: Any) -> dict[str, Any]:
    return {"model": name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0, **fields}


class Streams:
    """Each in a thread of its own; all have begun when this is made."""

    def __init__(self, url: str, count: int = NUM_ADAPTERS) -> None:
        self._url = url
        self._begun = threading.Semaphore(0)
        self._pool = ThreadPoolExecutor(count)
        self._results = [self._pool.submit(self._one, NAMES[number % NUM_ADAPTERS]) for number in range(count)]
        for _ in range(count):
            self._begun.acquire()

    def ended(self) -> list[tuple[str, list[int], list[str]]]:
        """Of each the name, its token ids, and the codes of its errors; every one has ended by [DONE]."""
        with self._pool:
            return [result.result() for result in self._results]

    def _one(self, name: str) -> tuple[str, list[int], list[str]]:
        body = chat(name, max_tokens=LONG, ignore_eos=True, stream=True, return_token_ids=True)
        ids: list[int] = []
        errors: list[str] = []
        last = ""
        with httpx.stream("POST", f"{self._url}/v1/chat/completions", json=body, timeout=300) as answer:
            assert answer.status_code == 200, answer.read()
            is_begun = False
            for line in answer.iter_lines():
                if not line.startswith("data: "):
                    continue
                last = line.removeprefix("data: ")
                chunk = json.loads(last) if last != "[DONE]" else {}
                errors += [chunk["error"]["code"]] if "error" in chunk else []
                ids += [token for choice in chunk.get("choices", ()) for token in choice.get("token_ids", ())]
                if ids and not is_begun:
                    is_begun = True
                    self._begun.release()
        assert last == "[DONE]"
        return name, ids, errors


def expected(one: Running) -> dict[str, list[int]]:
    """By adapter, what one machine makes of it."""
    found = {}
    for name in NAMES:
        body = chat(name, max_tokens=LONG, ignore_eos=True, return_token_ids=True)
        answer = one.client.post("/v1/chat/completions", json=body).json()
        found[name] = answer["choices"][0]["token_ids"]
    return found


@contextmanager
def asking(url: str, right: dict[str, list[int]], count: int) -> Iterator[list[str]]:
    """So many requests at once until the block ends, which gives what was wrong with their answers; none fails."""
    faults: list[str] = []
    has_ended = threading.Event()

    def ask(number: int) -> None:
        with httpx.Client(base_url=url, timeout=120) as client:
            while not has_ended.is_set():
                number += 1
                name = NAMES[number % NUM_ADAPTERS]
                body = chat(name, max_tokens=16, ignore_eos=True, return_token_ids=True)
                answer = client.post("/v1/chat/completions", json=body)
                if answer.status_code != 200:
                    faults.append(answer.text)
                elif answer.headers["x-swaplora-adapter"] != f"{name}@1":
                    faults.append(f"{name} by {answer.headers['x-swaplora-adapter']}")
                elif answer.json()["choices"][0]["token_ids"] != right[name][:16]:
                    faults.append(f"{name} says {answer.text}")

    with ThreadPoolExecutor(count) as pool:
        asked = [pool.submit(ask, number) for number in range(count)]
        try:
            yield faults
        finally:
            has_ended.set()
            for each in asked:
                each.result()
