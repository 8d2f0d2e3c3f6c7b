"""Replicas that share a store: what one of them has taken all of them have, and nobody hears an older one any more."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

import tiny
from clusters import Front, actors
from oracle import Oracle
from swaplora_adapters.store.shared.files import SharedFiles
from swaplora_server.cluster.exchange import Answer
from swaplora_server.cluster.rendezvous import Rendezvous

pytestmark = pytest.mark.xdist_group("front")
PROMPT = [11, 12, 13, 14]
NUM_VERSIONS = 6
TIE = 1e-4


@pytest.fixture(autouse=True)
def both(front: Front) -> None:
    """There are two, whatever came before."""
    front.wait_for(2)


def put(front: Front, name: str, adapter: Path) -> int:
    files = {
        "config": (adapter / "adapter_config.json").read_bytes(),
        "weights": (adapter / "adapter_model.safetensors").read_bytes(),
    }
    answer = front.client.put(f"/v1/adapters/{name}", files=files)
    assert answer.status_code in (200, 201), answer.text
    version: int = answer.json()["version"]
    return version


def body_of(name: str) -> dict[str, Any]:
    fields = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"model": name, "prompt": PROMPT, **fields}


def of_each(front: Front, name: str) -> list[Answer]:
    """A completion of each replica."""
    return front.of_each("POST", "/v1/completions", body_of(name))


def token_ids(raw: bytes) -> list[int]:
    found: list[int] = json.loads(raw)["choices"][0]["token_ids"]
    return found


def test_what_was_taken_is_had_by_all_at_once(front: Front, adapters: list[Path], base: Path) -> None:
    for number in range(4):
        name = f"n{number}"
        put(front, name, adapters[number])
        answers = of_each(front, name)
        assert [answer.status for answer in answers] == [200, 200]
        oracle = Oracle(base, adapters[number])
        assert all(oracle.is_greedy(PROMPT, token_ids(answer.body), TIE) for answer in answers)
        assert front.client.delete(f"/v1/adapters/{name}").status_code in (200, 202)
        assert [answer.status for answer in of_each(front, name)] == [404, 404]


def test_a_replaced_adapter_is_never_heard_again(front: Front, base: Path, tmp_path: Path) -> None:
    """Under traffic on both replicas: no request that began after an acknowledgement has an older answer, or a mix."""
    versions = [tiny.save_adapter(tmp_path / f"v{n}", base, seed=90 + n, rank=4 + n) for n in range(NUM_VERSIONS)]
    oracles = {number: Oracle(base, folder) for number, folder in enumerate(versions, start=1)}
    acknowledged = put(front, "hot", versions[0])
    faults: list[Any] = []
    heard: set[tuple[int, tuple[int, ...]]] = set()
    has_ended = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=front.url, timeout=60) as client:
            while not has_ended.is_set():
                least = acknowledged
                answer = client.post("/v1/completions", json=body_of("hot"))
                if answer.status_code != 200:
                    faults.append(answer.text)
                    continue
                version = int(answer.headers["x-swaplora-adapter"].partition("@")[2])
                heard.add((version, tuple(token_ids(answer.content))))
                if version < least:
                    faults.append((least, version))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for folder in versions[1:]:
        acknowledged = put(front, "hot", folder)
        heard |= {(acknowledged, tuple(token_ids(answer.body))) for answer in of_each(front, "hot")}
    has_ended.set()
    for thread in threads:
        thread.join()
    assert faults == []
    assert {version for version, _ in heard} >= set(range(2, NUM_VERSIONS + 1))
    for version, ids in heard:
        right = [number for number, oracle in oracles.items() if oracle.is_greedy(PROMPT, [*ids], TIE)]
        assert right == [version]


def test_who_asks_a_replica_that_is_lost_while_it_fetches_is_answered_by_the_other(
    front: Front, base: Path, tmp_path: Path
) -> None:
    """By the adapter that was asked and no other, and so is whoever asks after that. The last test: one is left."""
    homes = Rendezvous()
    homes.set_members(answer.replica for answer in front.of_each("GET", "/v1/models"))
    other, victim = homes.order("")
    name = next(name for number in count() if homes.order(name := f"f{number}")[0] == other)
    alias = next(alias for number in count() if homes.order(alias := f"to{number}")[0] == victim)
    folder = tiny.save_adapter(tmp_path / "adapter", base, seed=77)
    put(front, name, folder)
    assert front.client.put(f"/v1/aliases/{alias}", json={"target": name}).status_code in (200, 201)
    has_begun = tmp_path / "begun"

    def hold_fetches(_actor: Any, path: str) -> None:
        def fetch(*_: Any) -> None:
            Path(path).touch()
            threading.Event().wait()

        SharedFiles.fetch = fetch  # type: ignore[method-assign, assignment]

    (actor,) = actors(f"#Engine#{victim}")
    ray.get(actor.__ray_call__.remote(hold_fetches, str(has_begun)))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(front.client.post, "/v1/completions", json=body_of(alias))
        while not has_begun.exists():
            assert not asked.done(), asked.result().text
            time.sleep(0.05)
        ray.kill(actor)
        answers = [asked.result(), *(front.client.post("/v1/completions", json=body_of(alias)) for _ in range(2))]
    oracle = Oracle(base, folder)
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-swaplora-adapter"] == f"{name}@1"
        assert oracle.is_greedy(PROMPT, token_ids(answer.content), TIE)
