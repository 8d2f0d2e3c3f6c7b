"""What tests ask of a server's gates."""

import json
import time
from pathlib import Path
from typing import Any

from runs import GUARD_SECONDS
from serving import Running

PROMPTS = [f"number {number} of some:" for number in range(6)]
NUM_TOKENS = 4


def answers(server: Running, model: str) -> list[dict[str, Any]]:
    """A task that `model` does without a fault."""
    body = {"model": model, "max_tokens": NUM_TOKENS, "temperature": 0}
    said = [server.client.post("/v1/completions", json=body | {"prompt": prompt}).json() for prompt in PROMPTS]
    return [{"prompt": prompt, "answer": one["choices"][0]["text"]} for prompt, one in zip(PROMPTS, said, strict=True)]


def gate_of(server: Running, name: str, task: object, min_score: float = 0.9, **fields: Any) -> dict[str, Any]:
    body = {"task": task, "min_score": min_score, "max_tokens": NUM_TOKENS} | fields
    answer = server.client.put(f"/v1/adapters/{name}/gate", json=body)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def gated(server: Running, name: str, folder: Path) -> list[dict[str, Any]]:
    """An adapter that must go on saying what it says, and the task of that."""
    assert server.put(name, folder).status_code == 201
    task = answers(server, name)
    gate_of(server, name, task)
    return task


def version(server: Running, name: str, number: int) -> dict[str, Any]:
    versions = server.client.get(f"/v1/adapters/{name}/gate").json()["versions"]
    found: dict[str, Any] = next(one for one in versions if one["version"] == number)
    return found


def judged(server: Running, name: str, number: int) -> dict[str, Any]:
    deadline = time.monotonic() + GUARD_SECONDS
    while (told := version(server, name, number))["standing"] == "candidate":
        assert time.monotonic() < deadline, told
        time.sleep(0.01)
    return told


def current(server: Running, name: str) -> int:
    number: int = server.client.get(f"/v1/adapters/{name}").json()["version"]
    return number


def promote(server: Running, name: str, number: int, **params: Any) -> Any:
    return server.client.patch(f"/v1/adapters/{name}", json={"current": number}, params=params)


def changes(audit: Path, name: str) -> list[tuple[str, int | None, str, str]]:
    lines = map(json.loads, audit.read_text().splitlines())
    return [(one["change"], one["version"], one["outcome"], one["key"]) for one in lines if one["name"] == name]
