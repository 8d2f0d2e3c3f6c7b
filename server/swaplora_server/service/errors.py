"""What a request cannot be given, in the words that its sender reads. Knows no HTTP: `http` gives a code its status."""


class RequestError(Exception):
    """A request that is refused, or that fails. `code` is stable, for programs; `param` names the field at fault."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
