"""What tests ask of a server's evaluations."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from serving import Running

GUARD_SECONDS = 120


def begin(server: Running, task: object, models: Sequence[str], **fields: Any) -> dict[str, Any]:
    answer = server.client.post("/v1/evaluations", json={"task": task, "models": list(models)} | fields)
    assert answer.status_code == 201, answer.text
    told: dict[str, Any] = answer.json()
    return told


def get(server: Running, name: str) -> dict[str, Any]:
    answer = server.client.get(f"/v1/evaluations/{name}")
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def ended(server: Running, name: str) -> dict[str, Any]:
    """The evaluation, once it has ended."""
    deadline = time.monotonic() + GUARD_SECONDS
    while (told := get(server, name))["ended"] is None:
        assert time.monotonic() < deadline, told
        time.sleep(0.01)
    return told


@contextmanager
def full(server: Running) -> Iterator[None]:
    """As many live requests as run at once: evaluations wait."""
    admission = server.service.admissions.admit(server.service.max_rows)
    try:
        yield
    finally:
        admission.release()


def means(told: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Model, metric and mean."""
    return {
        result["model"]: {name: metric["mean"] for name, metric in result["metrics"].items()}
        for result in told["results"]
    }
