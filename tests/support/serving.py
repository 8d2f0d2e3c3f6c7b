"""A real server on a free port of this machine, in a thread of the test's process, and what tests ask of it."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import torch

from repository import ROOT
from swaplora_server.base import loading
from swaplora_server.base.base_model import BaseModel
from swaplora_server.base.loading import load_chosen_base
from swaplora_server.config import Settings
from swaplora_server.http.app import create_app
from swaplora_server.http.transport.body_memory import BodyMemory
from swaplora_server.http.transport.connections import Connections
from swaplora_server.http.transport.protocol import HttpConfig
from swaplora_server.http.transport.server import HttpServer
from swaplora_server.service import service as service_module
from swaplora_server.service.service import Service

BASE = "base"
NUM_AT_REST = 3
# bases that a server of this process has loaded and proven, and left at rest; the next one of the same goes on with it
_at_rest: list[tuple[Hashable, BaseModel]] = []


@dataclass(frozen=True)
class Running:
    """A server that is up, and the parts of it that a test may look into."""

    url: str
    service: Service
    client: httpx.Client
    connections: Connections = field(default=None)  # type: ignore[assignment]  # of a server in this process
    bodies: BodyMemory = field(default=None)  # type: ignore[assignment]  # likewise

    def put(self, name: str, folder: Path, **headers: str) -> httpx.Response:
        """Upload an adapter's two files, as curl would."""
        with (
            (folder / "adapter_config.json").open("rb") as config,
            (folder / "adapter_model.safetensors").open("rb") as weights,
        ):
            files = {"config": config, "weights": weights}
            return self.client.put(f"/v1/adapters/{name}", files=files, headers=headers)

    def generate(self, model: str, prompt: list[int], max_tokens: int = 8, **fields: Any) -> httpx.Response:
        """A greedy completion with token ids."""
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True}
        return self.client.post("/v1/completions", json=body | fields)

    def token_ids(self, model: str, prompt: list[int], max_tokens: int = 8, **fields: Any) -> list[int]:
        """What a greedy completion generates."""
        response = self.generate(model, prompt, max_tokens, **fields)
        assert response.status_code == 200, response.text
        ids: list[int] = response.json()["choices"][0]["token_ids"]
        return ids

    def wait_idle(self, seconds: float = 60.0) -> None:
        """Return once nothing runs or waits and every block and lease is back; fail if that takes longer."""
        deadline = time.monotonic() + seconds
        while self.service.admissions.num_sequences or not self.service.engine.snapshot().is_at_rest:
            assert time.monotonic() < deadline, "the engine did not come to rest"
            time.sleep(0.01)
        self.service.registry.check_integrity()


def settings(base: Path, data_dir: Path, **fields: Any) -> Settings:
    """A small server: fp32, a KV cache of a few hundred blocks, nothing read from this machine's environment."""
    defaults: dict[str, Any] = {
        "base": str(base),
        "served_model_name": BASE,
        "data_dir": data_dir,
        "cache_dir": ROOT / ".cache",
        "dtype": "fp32",
        "device": "cpu",
        "port": 0,
        "kv_cache_bytes": 4 << 20,
        "max_wait_seconds": 86_400,  # a slow machine refuses nothing
        "log_level": "warning",
    }
    return Settings(**(defaults | fields))


@contextmanager
def listening(http: HttpConfig) -> Iterator[str]:
    """Serve an app on a free port, whose address this gives, until the block ends."""
    server = HttpServer(http)
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def serving(config: Settings) -> Iterator[Running]:
    """Start, yield, stop. Every test leaves the server at rest, which is checked here."""
    service = Service(config)
    made_of = _made_of(config)

    def lent(config: Settings, report: Callable[[str], None]) -> BaseModel:
        at_rest = next((entry for entry in _at_rest if entry[0] == made_of), None)
        if at_rest is None:
            return load_chosen_base(config, report)
        _at_rest.remove(at_rest)
        return at_rest[1]

    with patch.object(service_module, "load_chosen_base", lent):
        service.start(lambda _message: None)
    bodies = BodyMemory(config.body_memory_bytes)
    http = HttpConfig(create_app(service, bodies), config)
    try:
        with listening(http) as url, httpx.Client(base_url=url, timeout=600) as client:
            running = Running(url, service, client, http.connections, bodies)
            yield running
            running.wait_idle()
    finally:
        service.stop()
    _at_rest.append((made_of, service.base))
    del _at_rest[:-NUM_AT_REST]


def _made_of(config: Settings) -> Hashable:
    """What a base depends on."""
    files = tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in Path(config.base).glob("*"))
    kernels = tuple(os.environ.get(f"SWAPLORA_KERNEL_{name}") for name in ("LANES", "ORDER", "PLAIN"))
    fields = config.base, config.device, config.dtype, config.quantization, config.kernels, config.cache_dir
    patched = vars(loading)["pick_backend"], load_chosen_base  # by tests of what is loaded
    return fields, files, kernels, torch.get_num_threads(), patched


@dataclass
class Streamed:
    """What one stream said."""

    headers: Mapping[str, str]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    is_done: bool = False


async def stream_chat(client: httpx.AsyncClient, model: str, content: str, max_tokens: int, **fields: Any) -> Streamed:
    """One greedy chat answer, streamed, with token ids and their logprobs."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "logprobs": True,
        "return_token_ids": True,
        **fields,
    }
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        said = Streamed(dict(response.headers))
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                read_event(said, line.removeprefix("data: "))
    return said


def read_event(said: Streamed, data: str) -> None:
    """Add one server-sent event to what was said."""
    if data == "[DONE]":
        said.is_done = True
        return
    chunk = json.loads(data)
    said.error = chunk.get("error")
    for choice in chunk.get("choices", []):
        said.token_ids += choice.get("token_ids", [])
        said.text += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
        if choice["logprobs"]:
            said.logprobs += [token["logprob"] for token in choice["logprobs"]["content"]]
        said.finish_reason = choice["finish_reason"] or said.finish_reason
