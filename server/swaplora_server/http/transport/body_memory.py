"""How much of request bodies is in memory, of all requests together, from a body's first byte to its request's end."""

from starlette.types import ASGIApp, Receive, Scope, Send

from swaplora_server.end_rate import EndRate
from swaplora_server.service.errors import RequestError

_ACCOUNT = "swaplora.body_account"


class BodyMemory:
    """A bound on the bytes that all accounts together hold. Belongs to the event loop."""

    def __init__(self, limit: int, whole: "BodyMemory | None" = None) -> None:
        """`whole` is the memory that this is a part of."""
        self._limit = limit
        self._whole = whole
        self._given_back = EndRate()  # bytes
        self.used_bytes = 0

    def account(self) -> "BodyAccount":
        return BodyAccount(self)

    def take(self, num_bytes: int) -> None:
        """Raises RequestError when that is too much. Nobody waits: two halves of bodies could wait for each other."""
        if self.used_bytes + num_bytes > self._limit:
            seconds = self._given_back.retry_seconds(self.used_bytes + num_bytes - self._limit)
            message = f"the bodies of running requests fill their memory; try again in {seconds} s"
            raise RequestError("overloaded", message, retry_seconds=seconds)
        if self._whole is not None:
            self._whole.take(num_bytes)
        self.used_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        self.used_bytes -= num_bytes
        if num_bytes:
            self._given_back.note(num_bytes)
        if self._whole is not None:
            self._whole.give_back(num_bytes)


class BodyAccount:
    """What one request holds of it."""

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Raises RequestError when there is no memory for them."""
        self._memory.take(num_bytes)
        self.num_bytes += num_bytes

    def has_added(self, num_bytes: int) -> bool:
        """The same, of who can do without."""
        try:
            self.add(num_bytes)
        except RequestError:
            return False
        return True

    def close(self) -> None:
        """Give all of it back."""
        self._memory.give_back(self.num_bytes)
        self.num_bytes = 0


class AccountedBodies:
    """Plain ASGI: opens an account for each request, and closes it when the answer has gone out or nobody reads it."""

    def __init__(self, app: ASGIApp, memory: BodyMemory) -> None:
        self._app = app
        self._memory = memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        account = scope[_ACCOUNT] = self._memory.account()
        try:
            await self._app(scope, receive, send)
        finally:
            account.close()


def account_of(scope: Scope) -> BodyAccount:
    """The account of the request whose scope this is."""
    account: BodyAccount = scope[_ACCOUNT]
    return account
