"""A Ray cluster of nodes on this machine with replicas of a tiny base, and the server in front of them."""

import json
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ray
from filelock import FileLock
from ray import serve
from ray.cluster_utils import Cluster
from ray.util import list_named_actors

from repository import ROOT
from server_process import free_port
from serving import listening
from swaplora_server.cluster.build import application_of, engines, key_ring
from swaplora_server.cluster.exchange import Answer, Forwarded
from swaplora_server.cluster.front.ingress import Ingress
from swaplora_server.cluster.ray_engines import RayEngines
from swaplora_server.config import Settings
from swaplora_server.http.transport.protocol import HttpConfig

_STORE_BYTES = 150 << 20
_STARTING = Path(tempfile.gettempdir()) / "ray-nodes-start.lock"  # one after the other: a node that is late fails
_PATHS = [str(ROOT / folder) for folder in ("server", "adapters", "tests/support", "tests/ray")]


@dataclass(frozen=True)
class Nodes:
    """A cluster that is up, and where Ray Serve's own proxy listens."""

    cluster: Cluster
    proxy: str


@contextmanager
def ray_nodes(count: int, cpus: int) -> Iterator[Nodes]:
    """A cluster of `count` nodes, and Ray Serve on it with a proxy on the first."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # of those that Ray starts; a test's own process has them from pytest
    os.environ["PYTHONPATH"] = os.pathsep.join([*_PATHS, os.environ.get("PYTHONPATH", "")])
    node = {"num_cpus": cpus, "object_store_memory": _STORE_BYTES, "include_dashboard": False}
    with FileLock(_STARTING):
        cluster = Cluster(initialize_head=True, head_node_args=node)
        for _ in range(count - 1):
            cluster.add_node(num_cpus=cpus, object_store_memory=_STORE_BYTES)
    try:
        ray.init(address=cluster.address, log_to_driver=bool(os.environ.get("SHOW_RAY")), configure_logging=False)
        with free_port() as port:
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        yield Nodes(cluster, f"http://127.0.0.1:{port}")
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


@dataclass(frozen=True)
class Front:
    """A server in front of replicas."""

    url: str
    client: httpx.Client
    handle: Any

    def ask_replicas(self, method: str, *args: Any) -> list[Any]:
        """What a method of each replica returns."""
        found: list[Any] = self.handle.broadcast(method, *args).results(timeout_s=60)
        return found

    def of_each(self, method: str, path: str, body: object = None) -> list[Answer]:
        """What each replica answers, asked itself."""
        raw = b"" if body is None else json.dumps(body).encode()
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "client": None, "server": None,
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }  # fmt: skip
        return self.ask_replicas("answer", Forwarded(scope, raw, True, uuid.uuid4().hex))

    def wait_for(self, count: int) -> None:
        """Until so many replicas answer."""
        while len(self.ask_replicas("record_routing_stats")) != count:
            time.sleep(0.1)


def actors(name: str) -> list[Any]:
    """Ray's actors in whose names this is."""
    named = [each for each in list_named_actors(all_namespaces=True) if name in each["name"]]
    return [ray.get_actor(each["name"], namespace=each["namespace"]) for each in named]


@contextmanager
def in_front(settings: Settings) -> Iterator[Front]:
    """Replicas as the settings say, and a server in front of them in this process."""
    name = application_of(settings)
    handle = serve.run(engines(settings), name=name, route_prefix=None)
    try:
        with fronting(settings, handle) as front:
            yield front
    finally:
        serve.delete(name)


@contextmanager
def fronting(settings: Settings, handle: Any) -> Iterator[Front]:
    http = HttpConfig(Ingress(settings, RayEngines(handle), key_ring(settings)), settings)
    with listening(http) as url, httpx.Client(base_url=url, timeout=120) as client:
        yield Front(url, client, handle)
