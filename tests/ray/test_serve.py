"""The two ways to have it: `swaplora serve --ray`, and Ray Serve's own with its proxies; and limits, which are one."""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

import tiny
from clusters import Nodes, in_front, ray_nodes
from repository import ROOT
from server_process import SMALL, process
from serving import BASE, settings
from swaplora_server.access.caller import KeyScope
from swaplora_server.access.key_file import create_key
from swaplora_server.cluster.build import app
from swaplora_server.config import Settings

TEXT = {"model": BASE, "prompt": "hello", "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """With a key for everything, and one of another tenant that may ask five times a minute."""
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    admin, _ = create_key(file, "default", (KeyScope.ADMIN,), None)
    some, _ = create_key(file, "acme", (KeyScope.GENERATE, KeyScope.READ), None)
    content = yaml.safe_load(file.read_text())
    content["keys"][1]["limits"] = {"requests_per_minute": 5}
    file.write_text(yaml.safe_dump(content))
    return file, admin, some


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with ray_nodes(2, cpus=3) as found:
        yield found


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def config(base: Path, folder: Path, **fields: Any) -> Settings:
    return settings(base, folder, ray=True, ray_cpus=1, **fields)


def test_a_limit_is_that_of_all_replicas(
    nodes: Nodes, base: Path, tmp_path: Path, key_file: tuple[Path, str, str]
) -> None:
    file, admin, some = key_file
    with in_front(config(base, tmp_path, key_file=file, ray_replicas="2")) as front:
        post = front.client.post
        answers = [post("/v1/completions", json=TEXT, headers=bearer(some)) for _ in range(8)]
        assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 3
        assert answers[-1].json()["error"]["code"] == "rate_limited"
        assert 0 < int(answers[-1].headers["retry-after"]) <= 60
        assert {post("/v1/completions", json=TEXT, headers=bearer(admin)).status_code for _ in range(8)} == {200}
        assert post("/v1/completions", json=TEXT).status_code == 401
        assert front.client.get("/metrics", headers=bearer(some)).status_code == 403
        assert front.client.get("/v1/evaluations/nobody", headers=bearer(admin)).status_code == 404


@pytest.fixture(scope="module")
def proxied(
    nodes: Nodes, base: Path, key_file: tuple[Path, str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """The application that `serve run` builds, behind Ray's proxy."""
    file, admin, _ = key_file
    given = config(base, tmp_path_factory.mktemp("data"), key_file=file, prefix_cache=False)
    serve.run(app(given.model_dump(exclude_unset=True)), name="proxied", route_prefix="/")
    try:
        with httpx.Client(base_url=nodes.proxy, headers=bearer(admin), timeout=120) as client:
            yield client
    finally:
        serve.delete("proxied")


def test_rays_proxy_passes_all_of_it_on(proxied: httpx.Client, adapters: list[Path], base: Path) -> None:
    files = {
        "config": (adapters[2] / "adapter_config.json").read_bytes(),
        "weights": (adapters[2] / "adapter_model.safetensors").read_bytes(),
    }
    assert proxied.put("/v1/adapters/mine", files=files).status_code == 201
    whole = proxied.post("/v1/completions", json={**TEXT, "model": "mine", "ignore_eos": True})
    assert whole.headers["x-swaplora-adapter"] == "mine@1"
    assert len(whole.headers.get_list("x-request-id")) == 1
    named = proxied.get("/v1/models", headers={"x-request-id": "mine-1"})
    assert named.headers.get_list("x-request-id") == ["mine-1"]
    streamed = {**TEXT, "model": "mine", "ignore_eos": True, "stream": True}
    text = ""
    with proxied.stream("POST", "/v1/completions", json=streamed) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                text += "".join(choice["text"] for choice in json.loads(line.removeprefix("data: "))["choices"])
    assert text == whole.json()["choices"][0]["text"]
    assert proxied.post("/v1/completions", json=TEXT, headers={"authorization": "Bearer no"}).status_code == 401
    assert proxied.post("/v1/completions", json={**TEXT, "model": "nobody"}).status_code == 404
    assert proxied.head("/v1/models").status_code == 200
    assert proxied.head("/v1/models").content == b""
    assert proxied.get("/ui").status_code == 200


def test_a_clients_going_reaches_through_the_proxy(proxied: httpx.Client) -> None:
    def value(name: str) -> float:
        lines = proxied.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if re.match(name, line))

    name = 'swaplora_generations_total{.*outcome="abandoned"'
    before = value(name)
    body = {**TEXT, "max_tokens": 480, "ignore_eos": True, "stream": True, "n": 16, "logprobs": 5}
    with proxied.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    while value("swaplora_running_sequences"):
        pass
    assert value(name) == before + 1


def test_the_command_drains(base: Path, tmp_path: Path) -> None:
    """`swaplora serve --ray`, told to stop in the middle of a stream."""
    tiny.save_adapter(tmp_path / "adapters" / "a", base, seed=1)
    flags = ("--ray", "--adapter-dir", str(tmp_path / "adapters"), "--served-model-name", BASE, *SMALL)
    with process(base, tmp_path / "data", *flags) as (server, client):
        body = {**TEXT, "model": "a", "max_tokens": 300, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-2:]
        assert last[1] == "data: [DONE]"
        assert json.loads(last[0].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert server.wait(60) == 0


def test_more_replicas_want_a_store_that_they_share(base: Path, tmp_path: Path) -> None:
    given = config(base, tmp_path).model_dump(exclude_unset=True)
    with pytest.raises(ValueError, match="ray_replicas: 1-2: more than one needs --shared-store"):
        app({**given, "ray_replicas": "1-2"})


def test_the_manifests_application_is_one_for_ray_serve() -> None:
    manifest = yaml.safe_load((ROOT / "deploy/ray/rayservice.yaml").read_text())
    schema = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    assert [each.import_path for each in schema.applications] == ["swaplora_server.cluster.build:app"]
