"""Gates of a server's adapters: set and removed, with the tasks that they name."""

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial

from swaplora_adapters.errors import StorageFailedError, StorageFullError
from swaplora_adapters.registry.card import Card
from swaplora_adapters.registry.changes import HOLD_SECONDS
from swaplora_adapters.registry.index import NamedVersions
from swaplora_adapters.registry.registry import Registry
from swaplora_server.evaluation.gate import Gate
from swaplora_server.evaluation.task import Task
from swaplora_server.service.errors import RequestError
from swaplora_server.service.gates.task_files import TaskFiles

MAX_GATES = 200  # of one tenant
MAX_TASK_BYTES = 1 << 20  # of a task that a gate names
MAX_TENANT_BYTES = 32 << 20  # of all of them, of one tenant


class Gates:
    """What gates there are stands with the names in the registry; here are their tasks. Lives on the event loop."""

    def __init__(self, files: TaskFiles, registry: Registry) -> None:
        """`registry` is that of all tenants. What no gate names any more is removed."""
        self.files = files
        self._registry = registry
        self._changes = asyncio.Lock()  # or a task could be swept before its gate is there
        self._swept: Collection[str | None] = ()  # all gates that there were at the last sweep
        for digest in self._named():  # of gates that were set before there was a shared store
            with suppress(OSError, StorageFailedError, StorageFullError):  # those that are here
                files.share(digest, registry.revision + 1, is_named=True)
        self._sweep()

    async def put(self, registry: Registry, name: str, gate: Gate, tasks: Sequence[Task]) -> Card:
        """Have new versions of `name`, of a tenant's `registry`, judged by this; durable when it returns what there is.

        Raises RequestError for one more than a tenant may have and for a mixture, and AdapterError.
        """
        if registry.names.index.is_mixture(name):
            message = f"{name[:128]} is a mixture, which has no versions: put the gate on its members"
            raise RequestError("invalid_request", message)
        async with self._held():
            registry.names.check_is_own(name)
            _check_number(registry, name)
            try:
                for task in tasks:
                    await asyncio.to_thread(self.files.put, task)
                await asyncio.to_thread(self._check_room, registry, name, tasks)  # brings here what is not here
                share = partial(self._share, registry, name, tasks)
                return await asyncio.to_thread(registry.set_gate, name, gate.model_dump_json(), share)
            finally:
                await asyncio.to_thread(self._sweep)

    async def remove(self, registry: Registry, name: str) -> None:
        """Let each new version be current at once. Raises RequestError where there is no gate, and AdapterError."""
        async with self._held():
            there_is_one = partial(gate_of, registry, name)  # when it is removed: another server may be quicker
            await asyncio.to_thread(registry.set_gate, name, None, there_is_one)
            await asyncio.to_thread(self._sweep)

    async def sweep(self) -> None:
        """Remove what no gate names any more, whichever server was told, and whatever went with the last one."""
        if self._swept != self._gates():
            with suppress(StorageFailedError, StorageFullError):
                async with self._held():
                    await asyncio.to_thread(self._sweep)

    @asynccontextmanager
    async def _held(self) -> AsyncIterator[None]:
        """With no other change of gates meanwhile. Raises what `Changes.check_known` does, rather than wait in vain."""
        while True:
            self._registry.names.changes.check_known()
            with suppress(TimeoutError):
                async with asyncio.timeout(HOLD_SECONDS):
                    await self._changes.acquire()
                break
        try:
            yield
        finally:
            self._changes.release()

    def _share(self, registry: Registry, name: str, tasks: Sequence[Task]) -> None:
        """Within the change by which they are named: what no gate names then another server may be removing."""
        self._check_room(registry, name, tasks)
        named = self._named()
        for task in tasks:
            self.files.share(task.digest, self._registry.revision + 1, is_named=task.digest in named)

    def _check_room(self, registry: Registry, name: str, tasks: Sequence[Task]) -> None:
        """Raise RequestError where these and those of the tenant's other gates are too much, or too many."""
        _check_number(registry, name)
        others = [named for named in registry.names.index.gated() if named.current.name != name]
        digests = {task.digest for named in others for task in read_gate(named).tasks}
        if (has := self.files.num_bytes(digests | {task.digest for task in tasks})) > MAX_TENANT_BYTES:
            message = f"the tasks of your gates would have {has} bytes, and may have {MAX_TENANT_BYTES}"
            raise RequestError("quota_exceeded", f"{message}: remove a gate, or name smaller tasks")

    def _sweep(self) -> None:
        """What cannot be done at this moment is done later."""
        changes = self._registry.names.changes
        seen = changes.seen  # before what is named, which is so after that change or a later one
        gates = self._gates()
        with suppress(StorageFailedError, StorageFullError):
            changes.check_known()
            self.files.sweep(self._named(), seen)
            self._swept = gates

    def _gates(self) -> Collection[str | None]:
        return {named.gate for named in self._registry.names.index.gated()}

    def _named(self) -> set[str]:
        return {task.digest for named in self._registry.names.index.gated() for task in read_gate(named).tasks}


def _check_number(registry: Registry, name: str) -> None:
    if registry.names.index.get(name).gate is None and len(registry.names.index.gated()) >= MAX_GATES:
        raise RequestError("quota_exceeded", f"{MAX_GATES} adapters have a gate: remove one first")


def gate_of(registry: Registry, name: str) -> Gate:
    """Raises RequestError where there is none, AdapterNotFoundError, and NotOwnerError for another tenant's."""
    registry.names.check_is_own(name)
    named = registry.names.index.get(name)
    if named.gate is None:
        raise RequestError("not_found", f"{name[:128]} has no gate: each new version is current at once")
    return read_gate(named)


def read_gate(named: NamedVersions) -> Gate:
    """Of a name that has one."""
    return Gate.model_validate_json(named.gate or "")
