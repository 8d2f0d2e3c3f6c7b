"""Where a name is looked for that is not here yet: the adapter folder, then the operator's template.

However many ask for a name, it is looked for once at a time.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from swaplora_adapters.artifact.complaints import quoted
from swaplora_adapters.artifact.names import validate_name
from swaplora_adapters.errors import (
    InvalidAdapterNameError,
    SourceFailedError,
    SourceNotAllowedError,
    SourceNotFoundError,
)
from swaplora_adapters.registry.sources.uri import FOLDER, parse_uri

PLACE = "{name}"
STOPPING = "the server is stopping"
NUM_WORKERS = 2
MISS_SECONDS, FAILURE_SECONDS = 30.0, 5.0
MAX_REMEMBERED = 10_000
MAX_LOOKS = 1_000


class Resolver:
    """Looks for names in the adapter folder, then where the operator's template says. Thread-safe."""

    def __init__(self, bring: Callable[[str, str], None], *, has_folder: bool, template: str | None = None) -> None:
        """`bring(name, uri)` fetches and publishes an adapter, and raises SourceNotFoundError for a miss.

        Raises SourceNotAllowedError, with a message for the operator, for a template that is written wrongly.
        """
        _check_template(template)
        self._bring = bring
        self._has_folder = has_folder
        self._template = template
        self._lock = threading.Lock()
        self._looks: dict[str, Future[bool]] = {}
        self._remembered: OrderedDict[str, tuple[float, Future[bool]]] = OrderedDict()  # until when; oldest first
        self._workers = ThreadPoolExecutor(max_workers=NUM_WORKERS, thread_name_prefix="adapter-resolve")
        self._is_closed = False

    @property
    def num_looks(self) -> int:
        """Names that are being looked for now."""
        return len(self._looks)

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

    def find(self, name: str) -> Future[bool]:
        """Whether the adapter was found and brought here. It fails with the first error that is not a miss.

        A miss is remembered for `MISS_SECONDS`, a failure for `FAILURE_SECONDS`. Callers share the future, so none of
        them can cancel it.
        """
        uris = self.candidates(name)
        if not uris:
            return _done(False)
        with self._lock:
            known = self._looks.get(name) or self._recall(name)
            if known is not None:
                return known
            if self._is_closed:
                return _failed(STOPPING)
            if len(self._looks) >= MAX_LOOKS:
                return _failed(f"{MAX_LOOKS} other adapters are being looked for; try again later")
            look: Future[bool] = Future()
            look.set_running_or_notify_cancel()
            self._looks[name] = look
            job = self._workers.submit(self._look, name, uris, look)
            job.add_done_callback(lambda job: _end_if_cancelled(job, look))
            return look

    def close(self) -> None:
        """Fail what waits for a worker at once, and wait for what runs."""
        with self._lock:
            self._is_closed = True
        self._workers.shutdown(wait=True, cancel_futures=True)
        self._looks.clear()

    def _recall(self, name: str) -> Future[bool] | None:
        """Needs `_lock`."""
        until, answer = self._remembered.get(name, (0.0, None))
        if answer is not None and until <= time.monotonic():
            del self._remembered[name]
            return None
        return answer

    def _look(self, name: str, uris: list[str], look: Future[bool]) -> None:
        """A worker's job."""
        try:
            is_found = any(self._is_brought(name, uri) for uri in uris)
        except Exception as error:  # noqa: BLE001 - the worker's boundary: a waiter must never hang
            look.set_exception(error)
            self._remember(name, look, FAILURE_SECONDS)
        else:
            look.set_result(is_found)
            self._remember(name, look, 0.0 if is_found else MISS_SECONDS)

    def _is_brought(self, name: str, uri: str) -> bool:
        try:
            self._bring(name, uri)
        except SourceNotFoundError:
            return False
        return True

    def _remember(self, name: str, look: Future[bool], seconds: float) -> None:
        """End the look; what follows it within `seconds` gets the same answer."""
        with self._lock:
            del self._looks[name]
            if seconds:
                self._remembered[name] = (time.monotonic() + seconds, look)
            while len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)


def _check_template(template: str | None) -> None:
    if template is None:
        return
    if template.startswith(FOLDER):
        raise SourceNotAllowedError(f"{quoted(template)}: folders need no template; --adapter-dir is looked at first")
    if template.count(PLACE) != 1:
        raise SourceNotAllowedError(f"{quoted(template)} must have {PLACE} in it once")
    parse_uri(template.replace(PLACE, "name"))


def _is_sound(uri: str) -> bool:
    try:
        parse_uri(uri)
    except SourceNotAllowedError:
        return False
    return True


def _end_if_cancelled(job: Future[None], look: Future[bool]) -> None:
    if job.cancelled():
        look.set_exception(SourceFailedError(STOPPING))


def _done(is_found: bool) -> Future[bool]:
    future: Future[bool] = Future()
    future.set_result(is_found)
    return future


def _failed(reason: str) -> Future[bool]:
    future: Future[bool] = Future()
    future.set_exception(SourceFailedError(reason))
    return future
