"""What a request cannot be given, in the words that its sender reads. Knows no HTTP: `http` gives a code its status."""

from enum import IntEnum


class RefusedBy(IntEnum):
    """What a request was refused for, where little of it was looked at: more of it each time."""

    KEY = 1  # whose it is: limits of its key or tenant
    TENANT = 2  # its tenant has no place, whatever it asks for
    NAMED = 3  # its tenant has no place for what the body names


class RequestError(Exception):
    """A request that is refused, or that fails. `code` is stable, for programs; `param` names the field at fault.

    `retry_seconds` is when trying again may help, where that is known. `by` says of what was decided by little of the
    request that the next one like it can be decided by as little.
    """

    def __init__(
        self,
        code: str,
        message: str,
        param: str | None = None,
        *,
        retry_seconds: int | None = None,
        by: RefusedBy | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_seconds = retry_seconds
        self.by = by
