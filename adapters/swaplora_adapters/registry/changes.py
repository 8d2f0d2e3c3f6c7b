"""Changes of names: one at a time, and each of what all others have left, those of other servers too."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import TypeVar

from swaplora_adapters.errors import StorageFailedError, StoreUnreachableError
from swaplora_adapters.store.journal import OutrunError
from swaplora_adapters.store.records import Touched
from swaplora_adapters.store.store import Store

T = TypeVar("T")
MAX_TRIES = 100
LOOK_SECONDS = 0.2  # between looks that nobody asked for
TIDY_SECONDS = 10.0
AWAY_SECONDS = 1.0  # that the store has not answered, after which nobody waits for it any more


class Changes:
    """Held (`with`) by whoever needs names to stay as they are: no change is made or taken over meanwhile."""

    def __init__(self, store: Store, adopt: Callable[[Touched], None]) -> None:
        """`adopt` has memory know what others have changed, with this held."""
        self._store = store
        self._adopt = adopt
        self._lock = threading.RLock()
        self._is_making = False
        self._seen = store.revision  # memory knows all changes up to this one
        self.away: str | None = None  # why the store has not answered for some time: nobody is to wait for it

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

    def make(self, job: Callable[[], T]) -> T:
        """What `job` returns, which makes one change at its end, if any; done again where another server was faster.

        So whatever it looks at before is as it is when the change is made. Within another job it is part of that.
        Raises StoreUnreachableError, after which the change may still come to be.
        """
        with self._lock:
            if self._is_making or not self._store.is_shared:
                return job()
            for num_tries in range(MAX_TRIES):
                if self.away is not None:
                    raise StoreUnreachableError(self.away)
                self._is_making = True
                try:
                    self.catch_up()
                    done = job()
                    self._seen = self._store.revision
                    return done
                except OutrunError:
                    time.sleep(random.uniform(0, 0.001 * min(num_tries, 20)))
                finally:
                    self._is_making = False
            raise StoreUnreachableError("too many others change adapters at this moment; try again")

    def catch_up(self) -> None:
        """Have memory know all that others have changed by now. Needs to be held."""
        touched = self._store.catch_up()
        if touched.names or touched.aliases:
            self._adopt(touched)
        self._seen = self._store.revision

    def look(self) -> None:
        """The same, held only if there is something new."""
        while self._store.is_behind(self._seen):
            with self._lock:
                self.catch_up()


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
        self._answered = time.monotonic()
        self._has_failed = False
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
            if self._changes.away is not None:
                future.set_exception(StoreUnreachableError(self._changes.away))
            elif self._is_closed:
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
            failure = self._looked()
            self._note(failure)
            for future in waiting:
                future.set_result(None) if failure is None else future.set_exception(failure)
        for future in waiting:
            future.set_result(None)

    def _looked(self) -> Exception | None:
        try:
            self._changes.look()
        except Exception as error:  # noqa: BLE001 - the thread's boundary: whoever waits must be told
            return error
        return None

    def _note(self, failure: Exception | None) -> None:
        """What is reported is the first failure of a row of them."""
        if failure is None:
            self._answered, self._changes.away = time.monotonic(), None
        elif time.monotonic() - self._answered > AWAY_SECONDS:
            is_ours = isinstance(failure, StorageFailedError)
            self._changes.away = str(failure) if is_ours else "what others have changed cannot be taken over"
        if failure is not None and not self._has_failed and not self._is_closed:
            self._report(failure)
        self._has_failed = failure is not None

    def _tidy_on(self) -> None:
        while not self._is_closed:
            try:
                self._tidy()
            except StorageFailedError:
                pass  # it is tried again
            except Exception as error:  # noqa: BLE001 - the thread's boundary
                self._report(error)
            with self._asked:
                self._asked.wait_for(lambda: self._is_closed, TIDY_SECONDS)
