"""Changes of names: one at a time, and each of what all others have left, those of other servers too."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from swaplora_adapters.errors import (
    AdapterError,
    StoppingError,
    StorageFailedError,
    StorageFullError,
    StoreChangedError,
    StoreUnreachableError,
)
from swaplora_adapters.files.disk import StoreError
from swaplora_adapters.store.journal import OutrunError
from swaplora_adapters.store.records import Touched
from swaplora_adapters.store.shared.history.entry import Entry
from swaplora_adapters.store.store import Store

T = TypeVar("T")
MAX_TRIES = 100
MAX_PAUSE = 4  # times as long as a try took, between two
LOOK_SECONDS = 0.2  # between looks that nobody asked for
TIDY_SECONDS = 10.0
AWAY_SECONDS = 1.0  # that the store has failed, after which nobody waits for it any more
HANGING_SECONDS = 2.0  # the same where it says nothing at all
KNOWN_SECONDS = 0.02  # after which a look asks whether a change that is made has found the same
HOLD_SECONDS = 0.5  # after which whoever waits for another's change asks whether that can come to an end


class Changes:
    """Held (`with`) by whoever needs names to stay as they are: no change is made or taken over meanwhile."""

    def __init__(self, store: Store, adopt: Callable[[Touched], None]) -> None:
        """`adopt` has memory know what others have changed, with this held."""
        self._store = store
        self._adopt = adopt
        self._lock = threading.RLock()
        self._is_making = False
        self._is_closed = False
        self._seen = store.revision  # memory knows all changes up to this one
        self.failure: AdapterError | None = None  # that others' changes could not be known for some time

    def __enter__(self) -> None:
        """Raises what `check_known` does, where whoever holds it waits for the store."""
        while not self._lock.acquire(timeout=HOLD_SECONDS):
            self.check_known()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

    def make(self, job: Callable[[], T]) -> T:
        """What `job` returns, which makes one change at its end, if any; done again where another server was faster.

        So whatever it looks at before is as it is when the change is made. Within another job it is part of that.
        Raises StoreUnreachableError, after which the change may still come to be, and what `check_known` does.
        """
        for num_tries in range(MAX_TRIES):
            with self:
                if self._is_making or not self._store.is_shared:
                    return job()
                self.check_known()
                self._is_making, began = True, time.monotonic()
                try:
                    self.look()
                    if self._is_closed:
                        raise StoppingError
                    done = job()
                    self._seen = self._store.revision
                    return done
                except OutrunError:
                    took = time.monotonic() - began
                finally:
                    self._is_making = False
            time.sleep(random.uniform(0, took * min(num_tries, MAX_PAUSE)))
        raise StoreUnreachableError("too many others change adapters at this moment; try again")

    @contextmanager
    def held_at_last(self) -> Iterator[None]:
        """The same as `with`, however long it takes. Raises StoppingError once it is closed and cannot be had."""
        while not self._lock.acquire(timeout=HOLD_SECONDS):
            if self._is_closed:
                raise StoppingError
        try:
            yield
        finally:
            self._lock.release()

    def look(self) -> None:
        """Have memory know all that others have changed by now: held only if there is something new.

        What the store knows and memory does not is told to memory again, if that came to no end before.
        """
        is_all = False
        while not is_all:
            seen = self._seen
            entries, is_all = self._store.unread(seen)
            if entries:
                self._know(entries, seen)

    def check_known(self) -> None:
        """Raise why others' changes have not been known for some time, if so: nobody is to wait for them."""
        if self.is_hanging:
            raise StoreUnreachableError("the shared store does not answer; try again")
        match self.failure:
            case None:
                return
            case StoreUnreachableError() | StorageFullError() | StoreChangedError() as failure:
                raise type(failure)(str(failure))
            case StorageFailedError() as failure:
                raise StorageFailedError(f"what others have changed cannot be taken over: {failure}")
            case _:
                raise StorageFailedError("what others have changed cannot be taken over")

    @property
    def seen(self) -> int:
        """The last change up to which memory knows all."""
        return self._seen

    @property
    def is_hanging(self) -> bool:
        """Whether the store says nothing at all: who waits for it may never come back."""
        asked_at = self._store.asked_at
        return asked_at is not None and time.monotonic() - asked_at > HANGING_SECONDS

    @property
    def is_stuck(self) -> bool:
        """Whether it is this server, not the store, for which others' changes are not known."""
        return self.failure is not None and not isinstance(self.failure, StoreUnreachableError)

    def close(self) -> None:
        """Nobody is to wait for what does not come to an end."""
        self._is_closed = True

    @property
    def heard_at(self) -> float:
        """When the store last answered, on the monotonic clock."""
        return self._store.heard_at

    def _know(self, entries: Sequence[Entry], since: int) -> None:
        """Unless a change that is made meanwhile, which takes over the same ones, has them known before it ends."""
        while not self._lock.acquire(timeout=KNOWN_SECONDS):
            if self._seen >= entries[-1].revision:
                return
        try:
            if new := [each for each in entries if self._seen == since or each.revision > self._seen]:
                self._adopt(self._store.catch_up(new))
                self._seen = max(self._seen, new[-1].revision)
        finally:
            self._lock.release()


class Looks:
    """Looks for others' changes, several times a second, and when somebody asks. One look is for all who asked before.

    (The read index of Ongaro's Raft, section 6.4: a reader need see no more than what was acknowledged before it came.)
    """

    def __init__(self, changes: Changes, tidy: Callable[[], None], report: Callable[[Exception], None]) -> None:
        """`report` is told what went wrong that nobody foresaw."""
        self._changes = changes
        self._tidy = tidy
        self._report = report
        self._asked = threading.Condition()
        self._waiting: list[Future[None]] = []
        self._is_closed = False
        self._failing_since: float | None = None
        self._threads = [
            threading.Thread(target=self._look_on, name="shared-look", daemon=True),
            threading.Thread(target=self._tidy_on, name="shared-tidy", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def wanted(self) -> Future[None]:
        """Done once all that was acknowledged before is known here; fails where that cannot be known."""
        future: Future[None] = Future()
        with self._asked:
            try:
                self._changes.check_known()
            except (StorageFailedError, StorageFullError) as error:
                future.set_exception(error)
            else:
                if self._is_closed:
                    future.set_result(None)
                else:
                    self._waiting.append(future)
                    self._asked.notify_all()
        return future

    def close(self) -> None:
        """End the threads; one that waits for a store that does not answer is left to itself."""
        with self._asked:
            self._is_closed = True
            self._asked.notify_all()
        for thread in self._threads:
            thread.join(1.0)

    def _look_on(self) -> None:
        while True:
            with self._asked:
                self._asked.wait_for(lambda: self._waiting or self._is_closed, LOOK_SECONDS)
                waiting, self._waiting = self._waiting, []
                if self._is_closed:
                    break
            began = time.monotonic()
            failure = self._looked()
            self._note(failure, began)
            for future in waiting:
                future.set_result(None) if failure is None else future.set_exception(failure)
        for future in waiting:
            future.set_result(None)

    def _looked(self) -> AdapterError | None:
        try:
            self._changes.look()
        except AdapterError as error:
            return error
        except StoreError as error:  # what is there is of a newer release, or damaged
            return StoreChangedError(str(error))
        except Exception as error:  # noqa: BLE001 - the thread's boundary: whoever waits must be told
            return StorageFailedError(type(error).__name__)
        return None

    def _note(self, failure: AdapterError | None, began: float) -> None:
        """Of the look that began then. What is reported is the first failure of a row of them."""
        if failure is None:
            self._failing_since = self._changes.failure = None
            return
        if self._failing_since is None:
            self._failing_since = began
            if not self._is_closed:
                self._report(failure)
        is_known = isinstance(failure, StoreChangedError)  # which does not pass
        if is_known or time.monotonic() - self._failing_since > AWAY_SECONDS:
            self._changes.failure = failure

    def _tidy_on(self) -> None:
        has_failed = False
        while not self._is_closed:
            try:
                self._tidy()
                has_failed = False
            except Exception as error:  # noqa: BLE001 - the thread's boundary
                if not (has_failed or self._is_closed):
                    self._report(error)  # the first of a row of them: it is tried again
                has_failed = True
            with self._asked:
                self._asked.wait_for(lambda: self._is_closed, TIDY_SECONDS)
