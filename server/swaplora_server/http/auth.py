"""Who may ask for what: each route says which scope it needs, and one that does not say so is served to nobody."""

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, TypeVar

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from swaplora_server.access.caller import Caller, KeyScope
from swaplora_server.access.limits import LimitReachedError
from swaplora_server.http.errors import IS_BEHIND
from swaplora_server.http.overload.asking_again import AskingAgain, limit_error
from swaplora_server.service.errors import RequestError
from swaplora_server.service.service import Service

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
COUNT_OUT = "swaplora.count_out"  # of a request's scope: what counts it out
COUNTED_AS = "swaplora.counted_as"  # likewise: the same in all replicas that have to do with it
_needed: dict[Callable[..., Any], frozenset[KeyScope] | None] = {}  # None: no key


def needs(*scopes: KeyScope) -> Callable[[Endpoint], Endpoint]:
    """Declare that a route is for keys with one of these scopes; stands between its path and its function."""

    def declare(endpoint: Endpoint) -> Endpoint:
        _needed[endpoint] = frozenset(scopes)
        return endpoint

    return declare


def public(endpoint: Endpoint) -> Endpoint:
    """Declare that a route needs no key."""
    _needed[endpoint] = None
    return endpoint


def check_declared(routes: Iterable[BaseRoute]) -> None:
    """Raise RuntimeError for a route that does not say whom it is for."""
    for route in routes:
        if getattr(route, "endpoint", None) not in _needed:
            raise RuntimeError(f"{route} does not say whom it is for: put @needs(KeyScope.…) above it")


def is_public(route: APIRoute) -> bool:
    """Whether it needs no key."""
    return _needed[route.endpoint] is None


async def authorise(request: Request) -> AsyncIterator[None]:
    """A dependency of every route. Notes in `request.state.caller` whom the request comes from, and counts it.

    Raises RequestError unless it carries `Authorization: Bearer KEY` with a key that is good now and has a scope of
    those that the route needs. Anthropic's clients send `x-api-key: KEY`, which counts where there is no Authorization.
    """
    scopes = _needed[request.scope["route"].endpoint]
    if scopes is None:
        yield
        return
    service: Service = request.app.state.service
    key = given_key(request.headers)
    caller = service.keys.find(key)
    if caller is None:
        raise RequestError("invalid_api_key", "send a valid API key as Authorization: Bearer KEY")
    request.state.caller = caller
    if not caller.may(scopes):
        wanted = " or ".join(sorted(scopes))
        raise RequestError("insufficient_scope", f"this needs a key with the scope {wanted}")
    is_change = scopes == {KeyScope.WRITE}
    request.state.asking_again = AskingAgain(service, request.scope["route"].path, key, caller, is_change)
    try:
        end = await service.meter.begin(caller.limited, is_change=is_change, counted_as=request.scope.get(COUNTED_AS))
    except LimitReachedError as error:
        raise limit_error(error) from error
    request.scope[COUNT_OUT] = end
    try:
        request.scope[IS_BEHIND] = not await service.see_others_changes()
        yield
    finally:
        end()  # if no answer was begun, or none ended


def given_key(headers: Mapping[str, str]) -> str | None:
    """The key that a request carries. Headers are looked up whatever their case."""
    if "authorization" not in headers:
        return headers.get("x-api-key")
    scheme, _, key = headers["authorization"].partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def caller_of(request: Request) -> Caller:
    """Whom a request to a route that needs a key comes from."""
    caller: Caller = request.state.caller
    return caller
