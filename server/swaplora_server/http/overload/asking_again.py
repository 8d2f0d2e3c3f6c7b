"""Whether the next request like one that was refused would be refused as well: the same decisions, without the app."""

from contextlib import suppress
from dataclasses import dataclass, field

from pydantic_core import from_json

from swaplora_adapters.errors import AdapterError
from swaplora_server.access.caller import Caller
from swaplora_server.access.limits import LimitReachedError
from swaplora_server.http.foreign.fields import NamingBody
from swaplora_server.service.adapter_mix import wanted_by
from swaplora_server.service.errors import RefusedBy, RequestError
from swaplora_server.service.service import Service
from swaplora_server.service.tenant import TenantService

_NEVER_SECONDS = 60  # who may send nothing is not to ask all the time
_OTHER_NAMES = frozenset(NamingBody.model_fields) - {"model"}  # fields that may say who answers, in ways of their own


def limit_error(error: LimitReachedError) -> RequestError:
    """What a request is told whose key or tenant may ask for no more."""
    seconds = error.retry_seconds or _NEVER_SECONDS
    return RequestError("rate_limited", str(error), retry_seconds=seconds, by=RefusedBy.KEY)


@dataclass(frozen=True, slots=True)
class AskingAgain:
    """Of a request what the requests like it have in common: the same route, asked with the same key."""

    service: Service
    route: str
    key: str | None = field(repr=False)
    caller: Caller  # whose key it was
    is_change: bool

    def error(self, by: RefusedBy, peer: str, body: bytes | bytearray | None) -> RequestError | None:
        """What the app would refuse the next one with for one of the reasons up to `by`.

        None where it would not, or where that cannot be told. `body` is the whole of it, where that is here, in JSON.
        """
        if self.service.keys.find(self.key) is not self.caller:  # it is another's, has other limits, or is not good
            return None
        service = TenantService(self.service, self.caller, "", peer)
        try:
            service.meter.counts.check(self.caller.limited, is_change=self.is_change)
            if by >= RefusedBy.TENANT:
                service.check_room()
            if by >= RefusedBy.NAMED and body is not None and not service.admissions.has_room_for_all:
                _check_named(service, body)
        except LimitReachedError as error:
            return limit_error(error)
        except RequestError as error:
            return error
        except AdapterError:
            return None
        return None

    def count(self, error: RequestError, status: int) -> None:
        """It was answered with `error`."""
        if error.by is not RefusedBy.KEY:
            with suppress(LimitReachedError):
                self.service.meter.counts.begin(self.caller.limited, is_change=self.is_change)()
        self.service.metrics.count_request(self.route, status)


def _check_named(service: Service, body: bytes | bytearray) -> None:
    """Raise RequestError where the caller's tenant has no place for what `body` plainly names."""
    if (wanted := _wanted(service, body)) is not None:
        service.check_serving()
        service.admissions.check_room(service.tenant, service.peer, wanted)


def _wanted(service: Service, body: bytes | bytearray) -> str | None:
    """What `body` is for, if it is plain what that is."""
    try:
        found = from_json(body)
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(model := found.get("model"), str) or not model:
        return None
    is_plain = all(found.get(name) is None for name in _OTHER_NAMES)
    return wanted_by(service, model, ()) if is_plain else None
