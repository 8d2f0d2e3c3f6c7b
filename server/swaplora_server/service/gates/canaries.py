"""Canaries: sides of weighted aliases that get no more requests once too many of theirs failed by the server's fault.

What is counted is in memory; that one has stepped back is durable.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import structlog

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


class Window:
    """How many of the last `seconds` there were, and how many failed, to a sixtieth of that time."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._part = seconds / NUM_PARTS
        self._clock = clock
        self._counts: deque[tuple[int, int, int]] = deque()  # part, all, failed

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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`registry` is that of all tenants; `count` hears of each that steps back."""
        self._registry = registry
        self._audit = audit
        self._count = count
        self._clock = clock
        self._windows: dict[str, tuple[Canary, Window]] = {}
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

    def _note(self, alias: str, canary: Canary, error: str | None) -> None:
        index = self._registry.names.index
        is_meant = index.is_alias(alias) and index.alias(alias).canary is canary  # not put again since it was asked
        if not is_meant or (error is not None and error not in FAULTS):
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
