"""Servers' registries on one shared store, and a store that can be told to fail."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

import adapter_files
from changer import BASE
from swaplora_adapters.errors import StoreUnreachableError
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.registry.card import PutResult
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.sources.source import Sources
from swaplora_adapters.store.shared.base import Base
from swaplora_adapters.store.shared.objects import Listed, Objects
from swaplora_adapters.store.shared.store import SharedStore

T = TypeVar("T")
SEEN_SECONDS = 60  # a slow machine fails nothing


class Disturbed:
    """Objects of another store, which can be had to fail, to be slow, or to lose answers."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._lock = threading.Lock()
        self.num_calls = 0
        self.before: Callable[[str, str], None] = lambda _call, _key: None
        self.after: Callable[[str, str], None] = lambda _call, _key: None

    def get(self, key: str) -> bytes | None:
        return self._told("get", key, lambda: self._objects.get(key))

    def create(self, key: str, content: bytes) -> bool:
        return self._told("create", key, lambda: self._objects.create(key, content))

    def put(self, key: str, path: Path) -> None:
        self._told("put", key, lambda: self._objects.put(key, path))

    def fetch(self, key: str, path: Path) -> bool:
        return self._told("fetch", key, lambda: self._objects.fetch(key, path))

    def under(self, prefix: str) -> list[Listed]:
        return self._told("under", prefix, lambda: self._objects.under(prefix))

    def remove(self, key: str) -> None:
        self._told("remove", key, lambda: self._objects.remove(key))

    def _told(self, call: str, key: str, do: Callable[[], T]) -> T:
        with self._lock:
            self.num_calls += 1
        self.before(call, key)
        done = do()
        self.after(call, key)
        return done

    def fail_every(self, number: int) -> None:
        """Every so many'th call fails, before or after it was done by turns."""

        def fail(is_after: bool) -> None:
            if self.num_calls % number == 0 and (self.num_calls // number) % 2 == is_after:
                raise unreachable()

        self.before = lambda _call, _key: fail(False)
        self.after = lambda _call, _key: fail(True)

    def vanish(self) -> None:
        """Nothing answers any more."""

        def fail(_call: str, _key: str) -> None:
            raise unreachable()

        self.before = fail

    def be_slow(self, seconds: float) -> None:
        self.before = lambda _call, _key: time.sleep(seconds)

    def come_back(self) -> None:
        self.before = self.after = lambda _call, _key: None


def unreachable() -> StoreUnreachableError:
    return StoreUnreachableError("the shared store does not answer (for a test)")


def registry(data_dir: Path, objects: Objects, base: Base = BASE, **fields: Any) -> Registry:
    """One server's, with room for all."""
    defaults: dict[str, Any] = {
        "sources": Sources(allowed=(), folder=None, max_weights_bytes=0),
        "layers": adapter_files.LAYERS,
        "dtype": torch.float32,
        "memory_budget": 1 << 30,
        "wait_seconds": 30,
        "keep_versions": 100,
        "base_model": "base",
        "report": lambda _error: None,
    }
    return Registry(SharedStore(data_dir, objects, base), **(defaults | fields))


def store_of(of: Registry) -> SharedStore:
    store = of._store  # noqa: SLF001
    assert isinstance(store, SharedStore)
    return store


@contextmanager
def replicas(folder: Path, objects: Sequence[Objects], **fields: Any) -> Iterator[list[Registry]]:
    """One for each of these, which all lead to one store."""
    with ExitStack() as stack:
        opened = []
        for number, each in enumerate(objects):
            opened.append(registry(folder / f"data{number}", each, **fields))
            stack.callback(opened[-1].close)
        yield opened


def put(of: Registry, name: str, folder: Path, **fields: Any) -> PutResult:
    """As an upload does."""
    with of.stage() as staging:
        for path, file in ((staging.config_path, CONFIG_FILE), (staging.weights_path, WEIGHTS_FILE)):
            path.write_bytes((folder / file).read_bytes())
        return of.put(name, staging, source="upload", **fields)


def see(of: Registry) -> None:
    """As a request does when it begins."""
    of.seen().result(SEEN_SECONDS)


def see_at_last(of: Registry) -> None:
    """As a client does that comes again where it is told that the store does not answer."""
    deadline = time.monotonic() + SEEN_SECONDS
    while True:
        try:
            return see(of)
        except StoreUnreachableError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def facts(of: Registry) -> dict[str, Any]:
    """All that a server knows of names and aliases, but for what is its own."""
    index = of.names.index
    names = {
        each.current.name: (each.current.version, each.is_pinned, each.shared_with, each.gate, each.versions)
        for each in index.all()
    }
    return names | {alias.alias: alias for alias in [*index.aliases(), *index.mixtures()]}
