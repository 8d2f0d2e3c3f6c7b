"""What one tenant takes of memory and of workers leaves the others theirs."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import tiny
from serving import Running, serving, settings
from swaplora_adapters.cancellation import Cancellation
from swaplora_adapters.files.naming import WEIGHTS_FILE
from swaplora_server.access.caller import KeyScope
from swaplora_server.access.key_file import create_key

PROMPT = list(range(40, 60))
ALL = (KeyScope.GENERATE, KeyScope.READ, KeyScope.WRITE)
TENANTS = ("acme", "zeta", "default")
ROOM = 4  # adapters that fit in memory


class Crowd:
    """A server of three tenants, and adapters of one size."""

    def __init__(self, server: Running, file: Path, keys: dict[str, str], folders: list[Path]) -> None:
        self.server, self.file, self.keys, self.folders = server, file, keys, folders
        self.nbytes = sum(tensor.nbytes for tensor in load_file(folders[0] / WEIGHTS_FILE).values())

    def become(self, tenant: str) -> Running:
        self.server.client.headers["authorization"] = f"Bearer {self.keys[tenant]}"
        return self.server

    def pin(self, tenant: str, name: str) -> tuple[int, str]:
        """The status, and what an error says."""
        answer = self.become(tenant).client.patch(f"/v1/adapters/{name}", json={"pinned": True})
        return answer.status_code, answer.json().get("error", {}).get("message", "")

    def limit(self, **tenants: dict[str, int]) -> None:
        """Write what tenants may have."""
        content = yaml.safe_load(self.file.read_text())
        self.file.write_text(yaml.safe_dump(content | {"tenants": tenants}))
        self.server.service.keys.refresh()


@pytest.fixture
def crowd(base: Path, tmp_path: Path) -> Iterator[Crowd]:
    file = tmp_path / "keys.yaml"
    keys = {tenant: create_key(file, tenant, ALL)[0] for tenant in TENANTS}
    folders = [tiny.save_adapter(tmp_path / f"a{n}", base, seed=60 + n, rank=8) for n in range(5)]
    nbytes = sum(tensor.nbytes for tensor in load_file(folders[0] / WEIGHTS_FILE).values())
    config = settings(base, tmp_path / "data", key_file=file, adapter_memory_bytes=ROOM * nbytes)
    with serving(config) as server:
        yield Crowd(server, file, keys, folders)


def test_what_tenants_pin_leaves_half_of_the_memory(crowd: Crowd) -> None:
    for number in range(3):
        assert crowd.become("acme").put(f"p{number}", crowd.folders[number]).status_code == 201
    assert crowd.become("zeta").put("z", crowd.folders[3]).status_code == 201
    assert [crowd.pin("acme", f"p{number}")[0] for number in range(2)] == [200, 200]
    for tenant, name in (("acme", "p2"), ("zeta", "z")):
        status, message = crowd.pin(tenant, name)
        assert (status, message) == (
            429,
            f"tenants may have pinned together {2 * crowd.nbytes} bytes, and this would be more: "
            "unpin one, or have the operator set pinned_bytes for this tenant",
        )
    assert crowd.become("zeta").generate("z", PROMPT).status_code == 200
    assert crowd.become("default").put("own", crowd.folders[4]).status_code == 201
    assert crowd.pin("default", "own")[0] == 200  # the operator's


def test_limits_say_what_a_tenant_may_pin(crowd: Crowd, base: Path, tmp_path: Path) -> None:
    for tenant in ("acme", "default"):
        for number in range(2):
            assert crowd.become(tenant).put(f"p{number}", crowd.folders[number]).status_code == 201
    crowd.limit(acme={"pinned_bytes": crowd.nbytes}, default={"pinned_bytes": 0})
    assert crowd.pin("acme", "p0")[0] == 200
    assert crowd.pin("acme", "p1") == (
        429,
        f"this tenant may have pinned {crowd.nbytes} bytes, and this would be more: unpin one",
    )
    assert crowd.pin("default", "p1")[0] == 429
    larger = tiny.save_adapter(tmp_path / "larger", base, seed=70, rank=9)
    refused = crowd.become("acme").put("p0", larger)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_exceeded")
    assert crowd.server.generate("p0", PROMPT).headers["x-swaplora-adapter"] == "p0@1"
    crowd.limit(acme={"pinned_bytes": 3 * crowd.nbytes})
    assert crowd.pin("acme", "p1")[0] == 200

    crowd.limit(acme={"pinned_bytes": 1})  # of more than it may have by now, what makes nothing larger may be
    assert crowd.become("acme").put("p0", crowd.folders[2]).status_code == 200
    changes: list[dict[str, Any]] = [{"shared_with": ["zeta"]}, {"shared_with": []}, {"current": 1}]
    for change in changes:
        assert crowd.become("acme").client.patch("/v1/adapters/p0", json=change).status_code == 200
    assert crowd.become("acme").put("p0", larger).status_code == 429


def test_who_has_as_many_jobs_as_it_may_is_refused_alone(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    for tenant in ("acme", "zeta"):
        assert crowd.become(tenant).put("p", crowd.folders[0]).status_code == 201
    may_go_on = threading.Event()
    derivations = crowd.server.service.derivations

    def held() -> None:
        assert may_go_on.wait(60)

    for jobs in (derivations.makes, derivations.counts, derivations.inspections):
        monkeypatch.setattr(jobs, "most", 1)
    asked: list[tuple[Any, str, str, dict[str, Any]]] = [
        (derivations.makes, "POST", "/v1/merged", {"json": {"name": "m", "from": [{"name": "p"}]}}),
        (derivations.inspections, "GET", "/v1/adapters/p/inspect", {}),
    ]
    ended = [jobs.submit("acme", held, Cancellation()) for jobs, *_ in asked]
    for _jobs, method, path, body in asked:
        refused = crowd.become("acme").client.request(method, path, **body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    threading.Timer(0.2, may_go_on.set).start()
    assert crowd.become("zeta").client.get("/v1/adapters/p/inspect").status_code == 200
    for job in ended:
        job.result(60)
    may_go_on.clear()
    job = derivations.counts.submit("acme", held, Cancellation())
    refused = crowd.become("acme").client.get("/v1/adapters/p/inspect?intruders=true")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    may_go_on.set()
    job.result(60)
