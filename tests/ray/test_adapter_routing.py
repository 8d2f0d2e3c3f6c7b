"""Three replicas on two nodes, and more adapters than each of them should have: who serves whom."""

import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
import ray
from ray.util import list_named_actors
from safetensors.numpy import load_file

import tiny
from clusters import Front, Nodes, in_front
from serving import settings

pytestmark = pytest.mark.xdist_group("three")
NUM_ADAPTERS, NUM_REPLICAS = 48, 3
NUM_IN_MEMORY = 32  # of each replica
NUM_BEFORE, NUM_REQUESTS = 300, 900
NAMES = [f"s{number}" for number in range(NUM_ADAPTERS)]
_SERIES = re.compile(r'swaplora_adapter_(hits|misses)_total\{replica="([^"]+)",adapter="(s\d+)"\} ([\d.e+]+)')


@pytest.fixture(scope="module")
def three(nodes: Nodes, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("shared")
    for seed, name in enumerate(NAMES):
        tiny.save_adapter(folder / name, base, seed=seed)
    nbytes = sum(tensor.nbytes for tensor in load_file(folder / NAMES[0] / "adapter_model.safetensors").values())
    memory = int((NUM_IN_MEMORY + 0.5) * nbytes)
    replicas = {"ray": True, "ray_replicas": "3", "ray_cpus": 1, "served_model_name": "three"}
    own = {**replicas, "adapter_dir": folder, "prefix_cache": False, "adapter_memory_bytes": memory}
    config = settings(base, tmp_path_factory.mktemp("replicas"), **own)
    with in_front(config) as found:
        yield found


def ask(front: Front, name: str) -> None:
    body = {"model": name, "prompt": name, "max_tokens": 8, "ignore_eos": True, "temperature": 0}
    answer = front.client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text


def served(front: Front) -> dict[str, Counter[tuple[str, str]]]:
    """(adapter, replica) → requests, of those that found the adapter in memory and of those that had to wait for it."""
    found: dict[str, Counter[tuple[str, str]]] = {"hits": Counter(), "misses": Counter()}
    for kind, replica, name, count in _SERIES.findall(front.client.get("/metrics").text):
        found[kind][name, replica] += int(float(count))
    return found


def homes(front: Front) -> dict[str, str]:
    """Adapter → the replica that serves it while nothing else runs."""
    before = served(front)
    for name in NAMES:
        ask(front, name)
    after = served(front)
    gone = (after["hits"] + after["misses"]) - (before["hits"] + before["misses"])
    assert len(gone) == NUM_ADAPTERS
    return dict(gone.keys())


def test_a_lost_replica_moves_those_that_it_served_and_no_others(three: Front) -> None:
    before = homes(three)
    assert len(set(before.values())) == NUM_REPLICAS
    victim = next(each for each in list_named_actors(all_namespaces=True) if "three#Engine#" in each["name"])
    lost = victim["name"].rpartition("#")[2]
    assert lost in before.values()
    ray.kill(ray.get_actor(victim["name"], namespace=victim["namespace"]))
    after = homes(three)
    assert {name for name in NAMES if before[name] != after[name]} == {name for name in NAMES if before[name] == lost}


def test_adapters_stay_where_they_are_and_all_replicas_have_as_much_to_do(three: Front) -> None:
    """By zipf's law, once all have been loaded somewhere; one of the replicas is new, in place of the lost one."""
    three.wait_for(NUM_REPLICAS)
    drawn = Random(1).choices(NAMES, [1 / rank for rank in range(1, NUM_ADAPTERS + 1)], k=NUM_BEFORE + NUM_REQUESTS)
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda name: ask(three, name), drawn[:NUM_BEFORE]))
        before = served(three)
        list(pool.map(lambda name: ask(three, name), drawn[NUM_BEFORE:]))
    counts = {kind: counted - before[kind] for kind, counted in served(three).items()}
    by_replica = Counter[str]()
    for (_, replica), count in (counts["hits"] + counts["misses"]).items():
        by_replica[replica] += count
    assert by_replica.total() == NUM_REQUESTS
    affinity = counts["hits"].total() / NUM_REQUESTS
    imbalance = max(by_replica.values()) * NUM_REPLICAS / NUM_REQUESTS
    print(f"affinity {affinity:.3f}, imbalance {imbalance:.2f}, loads {counts['misses'].total()}")  # noqa: T201
    assert affinity >= 0.95
    assert imbalance <= 1.3
