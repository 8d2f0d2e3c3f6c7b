"""Reading a JSON body: its size bounded, its numbers finite, its unknown fields told from those that change meaning."""

from codecs import BOM_UTF8
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from swaplora_server.http.dependencies import Serving
from swaplora_server.http.sse import until_disconnect
from swaplora_server.http.transport.body_memory import account_of
from swaplora_server.http.transport.encoding import body_chunks
from swaplora_server.http.transport.json_limits import check_limits
from swaplora_server.http.transport.models import BRANCH, Body
from swaplora_server.service.errors import RequestError
from swaplora_server.service.service import Service

_MAX_TYPE_CHARS = 64
SMALL_BYTES = 32 << 10  # parsed on the event loop
MAX_SMALL_BODY_BYTES = 64 << 10  # of what only manages: names, versions, sources
Model = TypeVar("Model", bound="Body")


def json_body(model: type[Model]) -> Callable[[Request, Service], Coroutine[Any, Any, Model]]:
    """A dependency that reads the request's body as `model`, or raises RequestError naming the field at fault."""

    async def read(request: Request, service: Serving) -> Model:
        return await read_json(request, service, model)

    return read


async def read_json(request: Request, service: Service, model: type[Model]) -> Model:
    """The request's body as `model`. Raises RequestError with the field at fault, or what to send instead of a form.

    Where there would be no room for the request whatever it says, it is refused before anything of it is read.
    """
    _check_type(request)
    if model.takes_place:
        service.check_room()
    limit = service.settings.max_body_bytes
    raw = await read_limited(request, limit if model.has_content else min(limit, MAX_SMALL_BODY_BYTES))
    parse = partial(_parse, model, raw)
    if len(raw) <= SMALL_BYTES:
        return parse()
    return await until_disconnect(request.receive, service.offload.do(len(raw), partial(service.gil_turns.do, parse)))


def _parse(model: type[Model], raw: bytearray) -> Model:
    if raw.startswith(BOM_UTF8):
        del raw[: len(BOM_UTF8)]
    check_limits(raw)
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise _as_request_error(error) from error


def is_json(content_type: str) -> bool:
    """Whether a Content-Type names JSON, `application/vnd.some+json` too, whatever parameters follow it."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _check_type(request: Request) -> None:
    """Raise RequestError unless the body says that it is JSON, or nothing: a page's form would say what it is."""
    content_type = request.headers.get("content-type", "")
    if content_type and not is_json(content_type):
        kind = content_type[:_MAX_TYPE_CHARS]
        message = f"the body must be JSON, not {kind!r}: send the header Content-Type: application/json"
        raise RequestError("unsupported_media_type", message, "Content-Type")


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """What a route that reads its own body says of it in the OpenAPI document, whose components it cannot add to."""
    schema = model.model_json_schema()
    schema = _inlined(schema, schema.pop("$defs", {}))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


_BOUNDS = {"ge": "minimum", "le": "maximum"}  # as pydantic calls them behind a validator


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """A JSON schema with the definition in the place of each reference to it. None of ours contains itself."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    own = {_BOUNDS.get(key, key): _inlined(value, definitions) for key, value in schema.items() if key != "$ref"}
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].removeprefix("#/$defs/")], definitions) | own
    return own


async def read_limited(request: Request, limit: int) -> bytearray:
    """The whole body, decoded, counted in the memory of all bodies.

    Raises RequestError body_too_large as soon as it is known to pass `limit` bytes, and overloaded for want of memory.
    """
    account = account_of(request.scope)
    body = bytearray()
    if int(request.headers.get("content-length", 0)) > limit:
        raise _too_large(limit)
    async for chunk in body_chunks(request, limit):
        if len(body) + len(chunk) > limit:
            raise _too_large(limit)
        account.add(len(chunk))
        body += chunk
    return body


def _too_large(limit: int) -> RequestError:
    return RequestError("body_too_large", f"the body is larger than {limit} bytes")


def _as_request_error(error: ValidationError) -> RequestError:
    """The first few complaints in one line; `param` is the path of the first."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    named = [(field_path(detail["loc"]), detail["msg"].removeprefix("Value error, ")[:200]) for detail in details[:5]]
    message = "; ".join(f"{path}: {text}" if path else text for path, text in named)
    return RequestError("invalid_request", message, named[0][0] or None)


def field_path(location: Sequence[str | int]) -> str:
    """Where a field stands, as OpenAI writes it: `messages[0].content`. What names a branch of ours is left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith(BRANCH):
            path += f".{part[:64]}" if path else part[:64]
    return path
