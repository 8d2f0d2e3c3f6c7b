"""Where adapters are made of others and measured against the base: one job at a time, beside what serves."""

import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TypeVar

from swaplora_adapters.artifact.base_layers import LinearShape
from swaplora_adapters.derive.base_files import BaseFiles
from swaplora_adapters.derive.making import Maker
from swaplora_adapters.derive.process import DerivationProcess
from swaplora_adapters.registry.sources.workers import Workers
from swaplora_server.config import Settings
from swaplora_server.engine.chosen_base import source_of
from swaplora_server.http.errors import ApiError
from swaplora_server.http.shared import result_of

MAX_JOBS = 8  # waiting and running
_JOIN_SECONDS = 3.0
T = TypeVar("T")


class Workshop:
    """One thread that waits for one process. `stop` ends both."""

    def __init__(self, settings: Settings, shapes: Mapping[str, LinearShape]) -> None:
        """`shapes` are the base's linears that adapters may target."""
        self.process = DerivationProcess()
        self.shapes = shapes
        self.maker = Maker(self.process, shapes, settings.base_id, settings.max_adapter_bytes)
        self._settings = settings
        self._thread = Workers(1, "derive")

    @property
    def base_source(self) -> str:
        """The folder or hub id that the base was loaded from."""
        return str(source_of(self._settings, lambda _step: None))

    @cached_property
    def base_files(self) -> BaseFiles:
        """The base's own weights."""
        return BaseFiles(self.base_source)

    async def do(self, job: Callable[[], T]) -> T:
        """What `job` returns, once its turn has come. Raises ApiError when more would wait than is good."""
        if self._thread.num_jobs >= MAX_JOBS:
            raise ApiError("overloaded", f"{MAX_JOBS} adapters are being made or measured; try again in a moment")
        return await result_of(self._thread.submit(job))

    def stop(self) -> None:
        """Fail all who wait, end the process, and wait a moment for what its job still does."""
        self._thread.stop()
        self.process.stop()
        self._thread.join(time.monotonic() + _JOIN_SECONDS)
