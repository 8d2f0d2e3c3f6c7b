"""The two ways to have it: `swaplora serve --ray`, and Ray Serve's own with its proxies; and limits, which are one."""

import json
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

import tiny
from clusters import Nodes, actors
from repository import ROOT
from server_process import SMALL, process
from serving import BASE, settings
from swaplora_server.access.caller import KeyScope
from swaplora_server.access.key_file import create_key
from swaplora_server.cluster.build import app
from swaplora_server.config import Settings

pytestmark = pytest.mark.xdist_group("three")
_SERIES = re.compile(r'swaplora_adapter_(hits|misses)_total\{replica="(\w+)",adapter="(at\d)"\} (\d+)')
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


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def config(base: Path, folder: Path, **fields: Any) -> Settings:
    return settings(base, folder, ray=True, ray_cpus=1, **fields)


@pytest.fixture(scope="module")
def proxied(
    nodes: Nodes, base: Path, key_file: tuple[Path, str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """The application that `serve run` builds, behind Ray's proxy: two ingresses, two replicas."""
    file, admin, _ = key_file
    store = {"shared_store": str(tmp_path_factory.mktemp("shared")), "ray_replicas": "2"}
    given = config(base, tmp_path_factory.mktemp("data"), key_file=file, prefix_cache=False, **store)
    serve.run(app(given.model_dump(exclude_unset=True)), name="proxied", route_prefix="/")
    try:
        with httpx.Client(base_url=nodes.proxy, headers=bearer(admin), timeout=120) as client:
            yield client
    finally:
        serve.delete("proxied")


def test_ingresses_agree_on_who_serves_whom_and_count_once(
    proxied: httpx.Client, adapters: list[Path], key_file: tuple[Path, str, str]
) -> None:
    """Each adapter is loaded by one replica, whichever ingress is asked; a limit is that of all of them together."""
    for number in range(4):
        put(proxied, f"at{number}", adapters[number])
    for _ in range(8):
        for number in range(4):
            answer = proxied.post("/v1/completions", json={**TEXT, "model": f"at{number}", "max_tokens": 1})
            assert answer.status_code == 200, answer.text
    served = _SERIES.findall(metrics(proxied))
    loads = [(name, replica) for kind, replica, name, count in served if kind == "misses" and int(count)]
    assert sorted(name for name, _ in loads) == [f"at{number}" for number in range(4)]
    assert sum(int(count) for *_, count in served) == 32
    streams = {**TEXT, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(proxied.post, "/v1/completions", json=streams) for _ in range(8)]
        while not all(num := running_at("proxied#Ingress#")):
            assert not all(each.done() for each in asked), num
    assert len(num) == 2
    some = bearer(key_file[2])
    answers = [proxied.post("/v1/completions", json=TEXT, headers=some) for _ in range(8)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 3
    assert answers[-1].json()["error"]["code"] == "rate_limited"
    assert 0 < int(answers[-1].headers["retry-after"]) <= 60
    assert {proxied.post("/v1/completions", json=TEXT).status_code for _ in range(8)} == {200}
    assert proxied.get("/metrics", headers=some).status_code == 403
    assert proxied.get("/v1/evaluations/nobody").status_code == 404


def metrics(client: httpx.Client) -> str:
    """Of both replicas."""
    while len(set(re.findall('replica="([^"]+)"', told := client.get("/metrics").text))) < 2:
        pass
    return re.sub(r"(\d)\.0$", r"\1", told, flags=re.MULTILINE)


def running_at(name: str) -> list[int]:
    """How many requests each of these Ray actors has."""
    return [ray.get(actor.get_num_ongoing_requests.remote()) for actor in actors(name)]


def put(client: httpx.Client, name: str, adapter: Path) -> None:
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = dict(zip(("config", "weights"), ((adapter / each).read_bytes() for each in names), strict=True))
    assert client.put(f"/v1/adapters/{name}", files=files).status_code == 201


def test_rays_proxy_passes_all_of_it_on(proxied: httpx.Client, adapters: list[Path], base: Path) -> None:
    put(proxied, "mine", adapters[2])
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
    """`swaplora serve --ray`, told to stop in mid-stream: what there is time for ends whole, the rest with an error."""
    tiny.save_adapter(tmp_path / "adapters" / "a", base, seed=1)
    slow = ("--max-num-seqs", "1", "--max-wait-seconds", "86400", "--drain-seconds", "8")
    flags = ("--ray", "--adapter-dir", str(tmp_path / "adapters"), "--served-model-name", BASE, *SMALL, *slow)
    with process(base, tmp_path / "data", *flags) as (server, client), ThreadPoolExecutor(40) as pool:
        body = {**TEXT, "model": "a", "max_tokens": 60, "ignore_eos": True, "stream": True}
        first = pool.submit(streamed, client, body, lambda: None)
        has_begun = threading.Event()
        others = [pool.submit(streamed, client, {**body, "max_tokens": 480}, has_begun.set) for _ in range(30)]
        has_begun.wait()
        server.send_signal(signal.SIGTERM)
        assert first.result() == (200, "length")
        ended = [each.result() for each in others]
        assert server.wait(120) == 0
    assert set(ended) <= {(200, "length"), (200, "draining"), (503, "draining"), (429, "overloaded")}
    assert (200, "draining") in ended


def streamed(client: httpx.Client, body: dict[str, Any], on_begun: Callable[[], None]) -> tuple[int, str]:
    """Its status, and the reason or the code that it ended with; every stream ends by [DONE]."""
    with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            return answer.status_code, json.loads(answer.read())["error"]["code"]
        lines = []
        for line in answer.iter_lines():
            lines += [line] if line else []
            on_begun()
    assert lines[-1] == "data: [DONE]"
    last = json.loads(lines[-2].removeprefix("data: "))
    return 200, last["error"]["code"] if "error" in last else last["choices"][0]["finish_reason"]


def test_more_replicas_want_a_store_that_they_share(base: Path, tmp_path: Path) -> None:
    given = config(base, tmp_path).model_dump(exclude_unset=True)
    with pytest.raises(ValueError, match="ray_replicas: 1-2: more than one needs --shared-store"):
        app({**given, "ray_replicas": "1-2"})


def test_the_manifests_application_is_one_for_ray_serve() -> None:
    manifest = yaml.safe_load((ROOT / "deploy/ray/rayservice.yaml").read_text())
    schema = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    assert [each.import_path for each in schema.applications] == ["swaplora_server.cluster.build:app"]
