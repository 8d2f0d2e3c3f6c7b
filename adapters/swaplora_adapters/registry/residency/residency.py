"""Which versions are in memory: a byte budget, least recently used first out, what is in use or pinned never.

Versions are known by digest alone, so two names with the same bytes share one copy. One thread gives room to those that
wait for it, another does the loads, one per digest however many wait for it, and one at a time, so that the model keeps
its cores. A third has brought here what is not here yet.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from swaplora_adapters.errors import (
    AdapterError,
    AdapterFailedError,
    AdapterTooLargeError,
    InvalidAdapterError,
    MemoryFullError,
    StoppingError,
)
from swaplora_adapters.priority import SHARE_OF_LOADS, lower_priority
from swaplora_adapters.registry.residency.claims import Claim, Resident
from swaplora_adapters.registry.residency.memory_queue import MemoryQueue
from swaplora_adapters.weights.served import AdapterWeights


def show(error: BaseException) -> None:
    """As Python tells of what nobody has caught."""
    sys.excepthook(type(error), error, error.__traceback__)


class Residency:
    """Owns the memory of adapters. Thread-safe; `retain` and `release` pair up, and `drop` forgets for good."""

    def __init__(
        self,
        load: Callable[[str], AdapterWeights],
        budget: int,
        wait_seconds: float,
        report: Callable[[BaseException], None] = show,
        on_evict: Callable[[str], None] = lambda _digest: None,
        to_bring: Callable[[str], Callable[[], None] | None] = lambda _digest: None,
    ) -> None:
        """`load` reads one digest's weights into memory; `budget` is in bytes of weights.

        Nobody waits for room for more than `wait_seconds`. `report` is told what went wrong in a load that nobody
        foresaw, and `on_evict`, with the lock held, which digest gave its room to another. `to_bring` says what else is
        to be done before a load, if anything, which no other load waits for.
        """
        self._load = load
        self._report = report
        self._queue = MemoryQueue(budget, wait_seconds, on_evict)
        self._reasons: dict[str, str] = {}
        self._is_closed = False
        self._changed = threading.Condition()
        self._loader = ThreadPoolExecutor(1, "adapter-load", initializer=lower_priority, initargs=(SHARE_OF_LOADS,))
        self._to_bring = to_bring
        self._bringer = ThreadPoolExecutor(1, "adapter-bring", initializer=lower_priority, initargs=(SHARE_OF_LOADS,))
        self._dispatcher = threading.Thread(target=self._dispatch, name="adapter-admission", daemon=True)
        self._dispatcher.start()

    @property
    def resident_bytes(self) -> int:
        with self._changed:
            return self._queue.used_bytes

    @property
    def budget(self) -> int:
        """In bytes of weights."""
        return self._queue.budget

    def digests(self) -> tuple[frozenset[str], frozenset[str]]:
        """Those that are in memory, and those that are wanted and not there yet, at one moment."""
        with self._changed:
            return self._queue.resident_digests, self._queue.awaited_digests

    def check_size(self, nbytes: int) -> None:
        """Raise AdapterTooLargeError for what could never be loaded."""
        budget = self._queue.budget
        if nbytes > budget:
            raise AdapterTooLargeError(
                f"the adapter needs {nbytes} bytes of memory, and the server gives all of its adapters {budget}"
            )

    def check_pins(self, pinned: Mapping[str, int]) -> None:
        """Raise MemoryFullError unless all of these, digest → bytes, fit at once."""
        total, budget = sum(pinned.values()), self._queue.budget
        if total > budget:
            raise MemoryFullError(
                f"all pinned adapters would need {total} bytes of the {budget} that adapters have: unpin one"
            )

    def pin(self, pinned: Mapping[str, int]) -> None:
        """Keep exactly these in memory, and load those that are not there yet.

        Where all of them do not fit, the first ones are kept, and room is left for each of the others by turns.
        """
        with self._changed:
            self._queue.pin(pinned)
            self._prefetch_missing()
            self._changed.notify_all()

    def pins_not_kept(self) -> list[str]:
        """Digests that are pinned and may be evicted all the same, because all pins together exceed the budget."""
        with self._changed:
            return [digest for digest in self._queue.pinned if digest not in self._queue.kept]

    def state(self, digest: str) -> tuple[str, str | None]:
        """stored, loading, resident, draining or failed, and why it failed."""
        with self._changed:
            resident = self._queue.find(digest)
            if resident is not None and resident.weights is not None:
                return ("draining" if self._queue.is_draining(resident) else "resident"), None
            if resident is not None or self._queue.waiting_for(digest):
                return "loading", None
            reason = self._reasons.get(digest)
            return ("failed", reason) if reason else ("stored", None)

    def forget_failure(self, digest: str) -> None:
        """Let the next `retain` try again."""
        with self._changed:
            self._reasons.pop(digest, None)

    def retain(self, sizes: Mapping[str, int], tenant: str = "", beside: Mapping[str, int] | None = None) -> Claim:
        """Have all of these, digest → bytes, loaded if they are not there, and keep them until `release`: for a tenant.

        `beside` are bytes of what is to be made of their weights, which then counts for as long as these stay.

        Returns at once; what it returns holds no memory until there is room for all. Its weights fail with
        AdapterTooLargeError if that can never be, with MemoryFullError, StorageFailedError, or with AdapterFailedError
        if a stored version is at fault; that one is remembered, and fails at once until it is dropped.
        """
        claim = Claim(sizes, time.monotonic(), tenant, beside or {})
        with self._changed:
            refusal = self._refusal(claim)
            if refusal is not None:
                claim.weights.set_exception(refusal)
            elif not sizes:
                claim.weights.set_result({})
            else:
                self._queue.add(claim)
                self._admit()
                self._changed.notify_all()
        return claim

    def release(self, claim: Claim) -> None:
        """Let go of what `retain` gave, or is still to give. Harmless for a claim that failed."""
        with self._changed:
            if self._queue.leave(claim):
                self._prefetch_missing()
                self._changed.notify_all()

    def drop(self, digest: str) -> None:
        """Forget a version that nobody will ask for again, its failure included."""
        with self._changed:
            self._reasons.pop(digest, None)
            self._queue.drop(digest)
            for claim in self._queue.waiting_for(digest):  # it was to be prefetched
                self._fail(claim, AdapterFailedError("the adapter was deleted"))
            self._changed.notify_all()

    def stop(self) -> None:
        """Refuse all who wait for room, and whoever comes from now on; what is loaded, or being loaded, is."""
        with self._changed:
            self._is_closed = True
            for claim in self._queue.line:
                self._fail(claim, StoppingError())
            self._changed.notify_all()

    def close(self) -> None:
        """Let the load that runs end, and fail all others."""
        self.stop()
        self._dispatcher.join()
        self._bringer.shutdown(wait=False, cancel_futures=True)  # who knows how long what it waits for takes
        self._loader.shutdown(wait=True, cancel_futures=True)
        with self._changed:
            for claim in self._queue.claims:
                self._fail(claim, StoppingError())

    def check_integrity(self) -> None:
        """Raise RuntimeError if a count went below zero, the budget is exceeded, or what retired stays for nobody."""
        with self._changed:
            self._queue.check_integrity()

    def _refusal(self, claim: Claim) -> AdapterError | None:
        """Why nobody needs to try to load it."""
        if self._is_closed:
            return StoppingError()
        for digest, nbytes in claim.sizes.items():
            try:
                self.check_size(nbytes)
            except AdapterTooLargeError as error:  # the budget was larger when it was uploaded
                self._reasons[digest] = str(error)
            if digest in self._reasons:
                claim.at_fault = digest
                return AdapterFailedError(self._reasons[digest])
        return None

    def _prefetch_missing(self) -> None:
        """Have loaded what is pinned and could not be until now, unless it is itself at fault."""
        for digest, nbytes in self._queue.kept.items():
            is_there = self._queue.find(digest) is not None or self._queue.waiting_for(digest)
            if not (is_there or digest in self._reasons or self._is_closed):
                self._prefetch(digest, nbytes)

    def _prefetch(self, digest: str, nbytes: int) -> None:
        claim = self.retain({digest: nbytes})
        claim.weights.add_done_callback(lambda _weights: self.release(claim))

    def _dispatch(self) -> None:
        """A thread's life: see to the line whenever something or the time has changed it."""
        with self._changed:
            while not self._is_closed:
                self._admit()
                self._changed.wait(self._queue.seconds_to_wait(time.monotonic()))

    def _admit(self) -> None:
        """Admit all who can be, and refuse those for whom waiting has no point any more. Needs the lock."""
        while not self._is_closed:
            now = time.monotonic()
            if (claim := self._queue.next_admitted(now)) is not None:
                for resident in claim.residents:
                    self._have_loaded(resident)
                self._publish_if_loaded(claim)
            elif (claim := self._queue.next_refused(now)) is not None:
                self._fail(claim, self._no_room(claim))
            else:
                return

    def _have_loaded(self, resident: Resident) -> None:
        if not resident.is_loading:
            resident.is_loading = True
            self._loader.submit(self._fill, resident)

    def _fill(self, resident: Resident, *, is_brought: bool = False) -> None:
        """The other thread's job: load, and publish to all who wait by one assignment each; or tell them why not."""
        if self._is_given_up(resident):
            return
        weights = None
        with self._told(resident):
            if not is_brought and (bring := self._to_bring(resident.digest)) is not None:
                self._bringer.submit(self._bring, resident, bring)
            else:
                weights = self._load(resident.digest)
        if weights is not None:
            with self._changed:
                users = list(resident.users)
                self._queue.loaded(resident, weights)
                for claim in users:
                    self._publish_if_loaded(claim)
                self._changed.notify_all()

    def _bring(self, resident: Resident, bring: Callable[[], None]) -> None:
        """A third thread's job: what is to be done before the load."""
        if self._is_given_up(resident):
            return
        with self._told(resident):
            bring()
            with suppress(RuntimeError):  # it was closed meanwhile
                self._loader.submit(self._fill, resident, is_brought=True)

    @contextmanager
    def _told(self, resident: Resident) -> Iterator[None]:
        """Whoever waits for it is told why the body failed."""
        try:
            yield
        except (InvalidAdapterError, AdapterFailedError) as error:
            self._forget(resident, AdapterFailedError(str(error)), is_lasting=True)
        except AdapterError as error:
            self._forget(resident, error)
        except Exception as error:  # noqa: BLE001 - the thread's boundary: a waiter must never hang
            self._forget(resident, _defect(error))
            self._report(error)

    def _is_given_up(self, resident: Resident) -> bool:
        """Whether all who wanted it left before its turn; then it is forgotten."""
        with self._changed:
            if not resident.users:
                self._queue.forget(resident)
                self._changed.notify_all()
            return not resident.users

    def _publish_if_loaded(self, claim: Claim) -> None:
        weights = {resident.digest: resident.weights for resident in claim.residents if resident.weights is not None}
        if len(weights) == len(claim.residents):
            claim.weights.set_result(weights)

    def _forget(self, resident: Resident, error: AdapterError, *, is_lasting: bool = False) -> None:
        """Only what is wrong with the files is lasting; the rest may have passed by the next request."""
        with self._changed:
            claims = self._queue.forget(resident)
            if is_lasting and not resident.is_dropped:
                self._reasons[resident.digest] = str(error)
                claims += self._queue.waiting_for(resident.digest)
            for claim in claims:
                claim.at_fault = resident.digest
                self._fail(claim, error)
            self._changed.notify_all()

    def _fail(self, claim: Claim, error: AdapterError) -> None:
        self._queue.leave(claim)
        claim.weights.set_exception(error)

    def _no_room(self, claim: Claim) -> AdapterError:
        """Why it waits no longer."""
        wanted, kept, budget = claim.nbytes, self._queue.kept_besides(claim), self._queue.budget
        if wanted > budget:
            return AdapterTooLargeError(
                f"the request's {len(claim.sizes)} adapters need {wanted} bytes of memory at once, and the server "
                f"gives all of its adapters {budget}: name fewer, or raise --adapter-memory-bytes"
            )
        if wanted + kept > budget:
            return MemoryFullError(
                f"the request needs {wanted} bytes of the {budget} that adapters have, and pinned ones keep {kept}: "
                "unpin one, or raise --adapter-memory-bytes"
            )
        return MemoryFullError(
            f"adapters in use or pinned left no room for {wanted} bytes of the {budget} that adapters have within "
            f"{self._queue.wait_seconds:g} seconds: try again later, or raise --adapter-memory-bytes"
        )


def _defect(error: Exception) -> AdapterFailedError:
    return AdapterFailedError(f"the adapter could not be loaded ({type(error).__name__}); the server's log says more")
