"""One line in the log for each request, written when it is over."""

from collections.abc import Mapping
from typing import Any

import structlog
from starlette.types import Scope

from swaplora_server.access.caller import Caller

ASKED_TIME_AND_AGAIN = frozenset({"/health", "/health/ready", "/ping", "/version", "/metrics"})
_log = structlog.get_logger(__name__)


def log_request(scope: Scope, route: str, status: int | None, seconds: float, notes: Mapping[str, Any]) -> None:
    """`route` is the pattern and not the path, which is the client's; `notes` is what was found out meanwhile.

    What probes and scrapers ask is for debugging.
    """
    caller: Caller | None = scope.get("state", {}).get("caller")
    who = {} if caller is None else {"tenant": caller.tenant, "key": caller.key_id}
    log = _log.debug if route in ASKED_TIME_AND_AGAIN else _log.info
    log("request", method=scope["method"], route=route, status=status, **who, **notes, seconds=round(seconds, 4))
