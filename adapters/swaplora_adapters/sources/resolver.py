"""Where a name is looked for that is not here yet: the adapter folder, then the operator's template.

However many ask for a name, it is looked for once at a time, and only as long as one of them waits. Clients take turns,
so that a name waits for those of the same client before it, and for one of each other's.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

from swaplora_adapters.cancellation import Cancellation, WorkCancelledError
from swaplora_adapters.errors import (
    InvalidAdapterNameError,
    OverloadedError,
    SourceNotAllowedError,
    SourceNotFoundError,
)
from swaplora_adapters.files.naming import validate_name
from swaplora_adapters.sources.uri import FOLDER, PLACE, check_template, parse_uri
from swaplora_adapters.sources.workers import Workers

NUM_WORKERS = 2  # for the folder, and as many for what is far away and may be slow
MISS_SECONDS, FAILURE_SECONDS = 30.0, 5.0
MAX_REMEMBERED = 10_000
MAX_LOOKS, MAX_LOOKS_OF_ONE = 1_000, 100  # of all clients and of one

# Fetches and publishes what a URI leads to under a name, for as long as it is not cancelled.
Bring = Callable[[str, str, Cancellation], None]


class Look(NamedTuple):
    """Whether a name was found and brought here, and who waits for that: whoever does not any more leaves."""

    future: Future[bool]
    cancellation: Cancellation


class Resolver:
    """Looks for names in the adapter folder, then where the operator's template says. Thread-safe."""

    def __init__(self, bring: Bring, *, has_folder: bool, template: str | None = None) -> None:
        """`bring` raises SourceNotFoundError for a miss.

        Raises SourceNotAllowedError, with a message for the operator, for a template that is written wrongly.
        """
        self._template = None if template is None else check_template(template)
        self._bring = bring
        self._has_folder = has_folder
        self._lock = threading.Lock()
        self._looks: dict[str, Look] = {}
        self._remembered: OrderedDict[str, tuple[float, Future[bool]]] = OrderedDict()  # until when; oldest first
        self._near = Workers(NUM_WORKERS, "adapter-look-near")
        self._far = Workers(NUM_WORKERS, "adapter-look-far")

    def candidates(self, name: str) -> list[str]:
        """The URIs to try, in order; none for what cannot be an adapter's name, or cannot be in the template."""
        try:
            validate_name(name)
        except InvalidAdapterNameError:
            return []
        uris = [FOLDER + name] if self._has_folder else []
        if self._template is not None and _is_sound(uri := self._template.replace(PLACE, name)):
            uris.append(uri)
        return uris

    def find(self, name: str, client: Hashable = None) -> Look:
        """Begin to look, or join those who wait already. It fails with the first error that is not a miss.

        A miss is remembered for `MISS_SECONDS`, a failure for `FAILURE_SECONDS`; not that there were too many looks,
        which is OverloadedError. Askers share the future, so none of them can cancel it.
        """
        uris = self.candidates(name)
        if not uris:
            return Look(_done(False), Cancellation())
        with self._lock:
            known = self._recall(name)
            if known is not None:
                return Look(known, Cancellation())
            look = self._looks.get(name)
            if look is not None and look.cancellation.join():
                return look
            look = Look(Future(), Cancellation())
            look.future.set_running_or_notify_cancel()
            self._looks[name] = look
        self._ask(name, uris, look, client)
        return look

    def stop(self) -> None:
        """Fail every look, at once."""
        self._near.stop()
        self._far.stop()

    def join(self, until: float) -> None:
        """After `stop`: wait for the looks that run, to the moment `until` of the monotonic clock at most."""
        self._near.join(until)
        self._far.join(until)

    def _recall(self, name: str) -> Future[bool] | None:
        """Needs `_lock`."""
        until, answer = self._remembered.get(name, (0.0, None))
        if answer is not None and until <= time.monotonic():
            del self._remembered[name]
            return None
        return answer

    def _ask(self, name: str, uris: Sequence[str], look: Look, client: Hashable) -> None:
        """Look at the first of `uris`, and if that misses at the rest."""
        workers = self._near if uris[0].startswith(FOLDER) else self._far
        if workers.num_jobs >= MAX_LOOKS or workers.num_waiting_of(client) >= MAX_LOOKS_OF_ONE:
            job = _too_many()
        else:
            is_brought = partial(self._is_brought, name, uris[0], look.cancellation)
            job = workers.submit(is_brought, cancellation=look.cancellation, owner=client)
        job.add_done_callback(partial(self._answered, name, uris[1:], look, client))

    def _is_brought(self, name: str, uri: str, cancellation: Cancellation) -> bool:
        """A worker's job."""
        try:
            self._bring(name, uri, cancellation)
        except SourceNotFoundError:
            return False
        return True

    def _answered(self, name: str, rest: Sequence[str], look: Look, client: Hashable, job: Future[bool]) -> None:
        error = job.exception()
        if error is not None:
            is_lasting = not isinstance(error, WorkCancelledError | OverloadedError)
            self._remember(name, look, FAILURE_SECONDS if is_lasting else 0.0)
            look.future.set_exception(error)
        elif rest and not job.result():
            self._ask(name, rest, look, client)
        else:
            self._remember(name, look, 0.0 if job.result() else MISS_SECONDS)
            look.future.set_result(job.result())

    def _remember(self, name: str, look: Look, seconds: float) -> None:
        """The look has ended; what follows it within `seconds` gets the same answer."""
        with self._lock:
            if self._looks.get(name) is look:  # else it was abandoned, and another has begun
                del self._looks[name]
            if seconds:
                self._remembered[name] = (time.monotonic() + seconds, look.future)
            while len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)


def _is_sound(uri: str) -> bool:
    try:
        parse_uri(uri)
    except SourceNotAllowedError:
        return False
    return True


def _done(is_found: bool) -> Future[bool]:
    future: Future[bool] = Future()
    future.set_result(is_found)
    return future


def _too_many() -> Future[bool]:
    future: Future[bool] = Future()
    future.set_exception(OverloadedError("too many other adapters are being looked for; try again in a moment"))
    return future
