"""One cluster of two nodes for all tests, and on it replicas that share a store."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny
from clusters import Front, Nodes, in_front, ray_nodes
from serving import Running, serving, settings
from sixteen_adapters import SHAPES
from streams import NAMES
from swaplora_server.config import Settings


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    with ray_nodes(2, cpus=4) as found:
        yield found


@pytest.fixture(scope="session")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that all replicas read."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, shape) in enumerate(zip(NAMES, SHAPES, strict=False)):
        tiny.save_adapter(folder / name, base, seed=seed, **shape)
    return folder


@pytest.fixture(scope="session")
def config(base: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    own = {"adapter_dir": folder, "prefix_cache": False, "drain_seconds": 60, "max_body_bytes": 1 << 20}
    shared = {"shared_store": str(tmp_path_factory.mktemp("shared")), "max_num_seqs": 16}
    data = tmp_path_factory.mktemp("replicas")
    return settings(base, data, ray=True, ray_replicas="2", ray_cpus=1, **own, **shared)


@pytest.fixture(scope="session")
def front(config: Settings, nodes: Nodes) -> Iterator[Front]:
    with in_front(config) as found:
        yield found


@pytest.fixture(scope="session")
def one(config: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The same on one machine."""
    alone = {"ray": False, "ray_replicas": None, "ray_cpus": None, "shared_store": None}
    with serving(config.model_copy(update={**alone, "data_dir": tmp_path_factory.mktemp("one")})) as running:
        yield running
