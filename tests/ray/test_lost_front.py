"""A front that is killed leaves nothing under way at the replicas."""

import time
from pathlib import Path
from typing import Any

import pytest
import ray

from clusters import Front
from swaplora_server.cluster.exchange import Forwarded
from swaplora_server.cluster.front.route_key import ANYWHERE
from swaplora_server.cluster.ray_engines import RayEngines
from swaplora_server.config import Settings

pytestmark = pytest.mark.xdist_group("front")
UPLOAD = b'--x\r\nContent-Disposition: form-data; name="config"; filename="c"\r\n\r\n{'


class Uploading:
    """A front, as far as replicas know it, with uploads of which the rest is still to come."""

    async def begin(self, handle: Any, name: str) -> None:
        path = f"/v1/adapters/{name}"
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "PUT", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "client": None, "server": None,
            "headers": [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=x")],
        }  # fmt: skip
        self._engines = RayEngines(handle)
        self._messages = self._engines.stream(ANYWHERE, Forwarded(scope, UPLOAD, False, name))
        async for sent in self._messages:
            assert [message["type"] for message in sent] in ([], ["swaplora.wants_body"])
            if sent:
                return


def test_what_a_killed_front_had_under_way_ends(front: Front, config: Settings) -> None:
    """And what another has there does not, however long it takes."""

    def staged() -> list[Path]:
        return [*config.data_dir.glob("replica-*/**/staging/*")]

    assert not staged()
    fronts = [ray.remote(Uploading).options(num_cpus=0).remote() for _ in range(2)]
    for number, each in enumerate(fronts):
        ray.get(each.begin.remote(front.handle, f"begun{number}"))
    assert len(staged()) == 2
    ray.kill(fronts[1])
    began = time.monotonic()
    while len(staged()) == 2:
        time.sleep(0.1)
    assert time.monotonic() - began > 5  # it was not by this that it ended: Ray tells a replica nothing
    time.sleep(5)
    assert len(staged()) == 1
    ray.kill(fronts[0])
    while staged():
        time.sleep(0.1)
