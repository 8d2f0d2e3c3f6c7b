"""What a request cannot be given, in the words that its sender reads. Knows no HTTP: `http` gives a code its status."""


class RequestError(Exception):
    """A request that is refused, or that fails. `code` is stable, for programs; `param` names the field at fault.

    `retry_seconds` is when trying again may help, where that is known.
    """

    def __init__(self, code: str, message: str, param: str | None = None, *, retry_seconds: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_seconds = retry_seconds
