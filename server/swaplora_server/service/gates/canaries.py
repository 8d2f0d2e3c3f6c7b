"""Canaries: sides of weighted aliases that get no more requests once too many of theirs failed by the server's fault.

That one has stepped back is durable. What is counted is in memory, and in a file while the server is stopped.

canaries.json
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import structlog
from pydantic import TypeAdapter, ValidationError

from swaplora_adapters.errors import AdapterError
from swaplora_adapters.files.naming import DEFAULT_TENANT, tenant_of
from swaplora_adapters.registry.index import parse_reference
from swaplora_adapters.registry.naming import Naming
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.store.records import Canary, VersionRecord
from swaplora_server.access.audit import AuditLog
from swaplora_server.access.caller import Caller

KEY_ID = "canary"  # in the audit log, in place of a key
NUM_PARTS = 60  # of a window: as exact as it is
_log = structlog.get_logger(__name__)
Trial = Callable[[str | None], None]  # hears how a request that went to a canary ended: with which error's code, if one
# the server's fault; others are a client's doing, or say nothing of the version
FAULTS = frozenset({"adapter_failed", "adapter_too_large", "engine_failed", "internal_error"})


Count = tuple[int, int, int]  # a part of the time since the epoch, all in it, and failed ones
_KEPT: TypeAdapter[dict[str, tuple[Canary, list[Count]]]] = TypeAdapter(dict[str, tuple[Canary, list[Count]]])


class Window:
    """How many of the last `seconds` there were, and how many failed, to a sixtieth of that time."""

    def __init__(self, seconds: float, clock: Callable[[], float], counts: Iterable[Count] = ()) -> None:
        self._part = seconds / NUM_PARTS
        self._clock = clock
        self._counts = deque(counts)

    @property
    def counts(self) -> Sequence[Count]:
        """What another window of as many seconds goes on from."""
        return tuple(self._counts)

    def note(self, *, has_failed: bool) -> tuple[int, int]:
        """All and failed, with this one."""
        part = int(self._clock() / self._part)
        while self._counts and self._counts[0][0] <= part - NUM_PARTS:
            self._counts.popleft()
        num, failed = self._counts.pop()[1:] if self._counts and self._counts[-1][0] == part else (0, 0)
        self._counts.append((part, num + 1, failed + has_failed))
        return sum(each[1] for each in self._counts), sum(each[2] for each in self._counts)


class Canaries:
    """Counts for each alias that has one. Lives on the event loop."""

    def __init__(
        self,
        registry: Registry,
        audit: AuditLog,
        count: Callable[[], None],
        file: Path,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`registry` is that of all tenants; `count` hears of each that steps back.

        `file` has what was counted when a server was closed. It is read once: what was counted by one that is killed is
        forgotten.
        """
        self._registry = registry
        self._audit = audit
        self._count = count
        self._file = file
        self._clock = clock
        self._windows = self._read()
        self._steps: set[asyncio.Task[None]] = set()

    def trial(self, alias: str, name: str, record: VersionRecord) -> Trial | None:
        """What is to hear how a request of `alias` ended, which this version of `name` answers, both as stored.

        None where that is no canary, or one that has stepped back.
        """
        index = self._registry.names.index
        canary = index.alias(alias).canary if index.is_alias(alias) else None
        if canary is None or canary.stepped_back is not None:
            return None
        target = parse_reference(canary.target)
        return partial(self._note, alias, canary) if target.name == name and target.means(record) else None

    def miss(self, alias: str) -> None:
        """The canary of `alias` is not there any more: whoever was asked for it was answered with that."""
        index = self._registry.names.index
        canary = index.alias(alias).canary if index.is_alias(alias) else None
        if canary is not None and canary.stepped_back is None:
            self._note(alias, canary, "adapter_failed")

    def close(self) -> None:
        """Keep what is counted for the next server."""
        kept = {
            alias: (canary, list(window.counts))
            for alias, (canary, window) in self._windows.items()
            if self._is_current(alias, canary)
        }
        partial_file = self._file.with_suffix(".part")
        try:
            partial_file.write_bytes(_KEPT.dump_json(kept))
            partial_file.replace(self._file)
        except OSError as error:
            _log.warning("what is counted of canaries cannot be kept", reason=type(error).__name__)

    def _read(self) -> dict[str, tuple[Canary, Window]]:
        """Of those that are as they were."""
        index = self._registry.names.index
        try:
            content = self._file.read_bytes()
            self._file.unlink()  # else a server that is killed leaves it to the next, whatever was put again meanwhile
            kept = _KEPT.validate_json(content)
        except FileNotFoundError:
            return {}
        except (OSError, ValidationError) as error:
            _log.warning("what was counted of canaries cannot be read", reason=type(error).__name__)
            return {}
        found = {}
        for alias, (before, counts) in kept.items():
            canary = index.alias(alias).canary if index.is_alias(alias) else None
            if canary is not None and canary == before:
                found[alias] = canary, Window(canary.window_seconds, self._clock, counts)
        return found

    def _is_current(self, alias: str, canary: Canary) -> bool:
        """Whether the alias was not put again since."""
        index = self._registry.names.index
        return index.is_alias(alias) and index.alias(alias).canary is canary

    def _note(self, alias: str, canary: Canary, error: str | None) -> None:
        index = self._registry.names.index
        if not self._is_current(alias, canary) or (error is not None and error not in FAULTS):
            return
        counted, window = self._windows.get(alias, (None, None))
        if counted is not canary or window is None:
            window = Window(canary.window_seconds, self._clock)
            self._windows = {alias: counted for alias, counted in self._windows.items() if index.is_alias(alias)}
            self._windows[alias] = canary, window
        num, num_failed = window.note(has_failed=error is not None)
        if num >= canary.min_requests and num_failed > canary.max_error_rate * num:
            del self._windows[alias]
            reason = f"{num_failed} of {num} requests failed in {canary.window_seconds:g} s"
            step = asyncio.create_task(self._step_back(alias, canary, reason))
            self._steps.add(step)
            step.add_done_callback(self._steps.discard)

    async def _step_back(self, alias: str, canary: Canary, reason: str) -> None:
        try:
            is_done = await asyncio.to_thread(self._registry.step_back, alias, canary, reason)
        except AdapterError as error:
            _log.error("a canary could not step back", alias=alias, reason=str(error))
            return
        if is_done:
            self._count()
            _log.warning("a canary has stepped back", alias=alias, target=canary.target, reason=reason)
            tenant = tenant_of(alias)
            caller = Caller(KEY_ID, tenant or DEFAULT_TENANT, frozenset())
            version = parse_reference(canary.target).version
            name = Naming(tenant).said(alias)
            await asyncio.to_thread(self._audit.write, caller, "", "alias.step_back", name, version, None, "done")
