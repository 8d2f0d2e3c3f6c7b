"""The one error body, and the one table from error to HTTP status."""

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import structlog
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from swaplora_adapters.errors import (
    AdapterError,
    AdapterNotFoundError,
    AliasNotFoundError,
    StorageFailedError,
    StorageFullError,
    StoreChangedError,
    StoreUnreachableError,
    VersionMismatchError,
)
from swaplora_server.http.refusals import what_is_there
from swaplora_server.log_lines import notes
from swaplora_server.service.errors import RequestError

_log = structlog.get_logger(__name__)
_STATUS = {
    "invalid_request": 400,
    "unsupported_field": 400,
    "context_length_exceeded": 400,
    "invalid_adapter_name": 400,
    "source_not_allowed": 400,
    "invalid_api_key": 401,
    "insufficient_scope": 403,
    "origin_not_allowed": 403,
    "not_owner": 403,
    "model_not_found": 404,
    "adapter_not_found": 404,
    "version_not_found": 404,
    "alias_not_found": 404,
    "mixture_not_found": 404,
    "source_not_found": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "adapter_busy": 409,
    "adapter_failed": 409,
    "gate_failed": 409,
    "precondition_failed": 412,
    "body_too_large": 413,
    "adapter_too_large": 413,
    "unsupported_media_type": 415,
    "host_not_allowed": 421,
    "invalid_adapter": 422,
    "unsupported_adapter": 422,
    "derivation_failed": 422,
    "overloaded": 429,
    "rate_limited": 429,
    "quota_exceeded": 429,
    "headers_too_large": 431,
    "internal_error": 500,
    "source_failed": 502,
    "not_ready": 503,
    "draining": 503,
    "engine_failed": 503,
    "too_many_connections": 503,
    "store_unreachable": 503,
    "store_changed": 503,
    "deadline_exceeded": 504,
    "storage_full": 507,
    "storage_failed": 507,
    "memory_full": 507,
}
_RETRY_AFTER = {
    "overloaded": "1",
    "quota_exceeded": "60",
    "too_many_connections": "1",
    "not_ready": "5",
    "draining": "5",
    "memory_full": "5",
    "source_failed": "5",
    "store_unreachable": "5",
    "store_changed": "5",
}
# asking again is in vain, or too late
_FINAL = frozenset(
    {"adapter_busy", "adapter_failed", "gate_failed", "deadline_exceeded", "storage_full", "storage_failed"}
)
# what another server may have by now
_UNKNOWN = frozenset(
    {"model_not_found", "adapter_not_found", "version_not_found", "alias_not_found", "mixture_not_found"}
)
IS_BEHIND = "swaplora.is_behind"  # of a request's scope: others may have changed what is not known here
RETRY_HEADERS = ("retry-after", "x-should-retry")
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


def error_body(code: str, message: str, param: str | None = None) -> dict[str, dict[str, str | None]]:
    """OpenAI's error object, as it stands in a JSON answer and in a stream."""
    status = _STATUS[code]
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: RequestError | AdapterError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer to a request that failed with `error`."""
    param = error.param if isinstance(error, RequestError) else None
    notes()["error"] = error.code
    body = error_body(error.code, _message(error), param)
    return JSONResponse(body, _STATUS[error.code], headers={**_retry(error), **(headers or {})})


def _retry(error: RequestError | AdapterError) -> dict[str, str]:
    """What tells a client when to ask again, and OpenAI's and Anthropic's not to where they would by the status."""
    if isinstance(error, RequestError) and error.retry_seconds is not None:
        return {"Retry-After": str(error.retry_seconds)}
    if error.code in _RETRY_AFTER:
        return {"Retry-After": _RETRY_AFTER[error.code]}
    return {"x-should-retry": "false"} if error.code in _FINAL else {}


def _message(error: RequestError | AdapterError) -> str:
    """What it says, in words of the routes and headers that the library of adapters does not know."""
    match error:
        case AdapterNotFoundError():
            return f"{error}; GET /v1/adapters lists them"
        case AliasNotFoundError():
            return f"{error}; GET /v1/aliases lists them"
        case VersionMismatchError():
            return "the adapter's current version is not the one that If-Match names"
        case _:
            return str(error)


async def on_request_error(request: Request, error: Exception) -> JSONResponse:
    """Exception handler for RequestError and AdapterError."""
    assert isinstance(error, RequestError | AdapterError)
    if error.code in _UNKNOWN and request.scope.get(IS_BEHIND):
        error = StoreUnreachableError(
            f"{error}; but others may have made it, which is not known here at this moment: try again"
        )
    is_shared = isinstance(error, StoreUnreachableError | StoreChangedError)
    if isinstance(error, StorageFullError | StorageFailedError) and not is_shared:
        _log.error("the data directory cannot be written", reason=str(error))
    request.state.refused = error
    return error_response(error)


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Exception handler for what the framework refuses itself: unknown routes and methods."""
    assert isinstance(error, HTTPException)
    code = _HTTP_CODES.get(error.status_code, "invalid_request")
    headers = dict(error.headers or {})
    if error.status_code == 405 and (methods := request.app.state.methods.get(request.scope["route"].path)):
        headers["Allow"] = ", ".join(sorted(methods))  # of all routes at the path: the framework names one route's
    return JSONResponse(error_body(code, _words(request, error, headers)), error.status_code, headers=headers)


def _words(request: Request, error: HTTPException, headers: Mapping[str, str]) -> str:
    path, root_path = request.scope["path"], request.scope["root_path"]
    if path.startswith(f"{root_path}/"):
        path = path[len(root_path) :]
    if error.status_code == 404:
        return what_is_there(path)
    if error.status_code == 405:
        return f"{request.method} is not served at {path[:128]!r}; {headers.get('Allow', 'nothing else')} is"
    return str(error.detail)


async def on_invalid_parameter(_request: Request, error: Exception) -> JSONResponse:
    """Exception handler for a path, query or header parameter that is not what the route takes."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = str(first["loc"][-1])
    return JSONResponse(error_body("invalid_request", f"{param}: {first['msg']}", param), 400)


async def on_client_gone(_request: Request, _error: Exception) -> Response:
    """Exception handler for a client that left before it was answered: nobody reads this."""
    return Response(status_code=499)


async def on_defect(_request: Request, _error: Exception) -> JSONResponse:
    """Exception handler for what nobody foresaw: the log has the traceback, the client has nothing of it."""
    message = "the server made a mistake; its log says more under this answer's X-Request-Id"
    return JSONResponse(error_body("internal_error", message), 500)


def errors_told_by(told: Callable[[JSONResponse], Response]) -> type[APIRoute]:
    """Routes whose errors, those of their dependencies too, are what `told` makes of ours: another API's shape."""

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            answer = super().get_route_handler()

            async def answered(request: Request) -> Response:
                try:
                    return await answer(request)
                except (RequestError, AdapterError) as error:
                    return told(await on_request_error(request, error))

            return answered

    return Route
