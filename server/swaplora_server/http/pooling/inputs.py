"""What the service is asked to make of inputs, and what all of its answers have in common."""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from swaplora_server.engine.pooling.kinds import Reader
from swaplora_server.engine.request import AdapterUse
from swaplora_server.http.answers import adapter_headers
from swaplora_server.http.foreign.names import terms_of
from swaplora_server.http.pooling.wire import WHAT_FITS, InputBody, WholeBody
from swaplora_server.http.sse import until_disconnect
from swaplora_server.http.tasks import asker_of, salt_of, urgency_of
from swaplora_server.service.errors import RequestError
from swaplora_server.service.pooling.inputs import Encoded, single_inputs
from swaplora_server.service.pooling.pooling import Pooled, PoolingTask, pool
from swaplora_server.service.prompts import Truncation
from swaplora_server.service.service import Service

_LONG_NUMBERS = 4096  # an answer with more is written off the event loop
Reading = Callable[[Sequence[AdapterUse]], Reader]
Told = Callable[[Pooled], list[dict[str, Any]]]


async def answer_inputs(
    request: Request, service: Service, body: InputBody, reader: Reading, id_prefix: str, told: Told
) -> Response:
    """Have each input computed by itself, and answer with what is `told` of each."""
    _check(body)
    encode = partial(
        service.tokenizer.encode_all,
        body.inputs,
        body.input_param,
        add_special_tokens=body.add_special_tokens,
        truncation=truncation_of(service, body),
    )
    encoded = partial(single_inputs, service, encode, body.input_param, reader)
    pooled = await pooled_of(request, service, body, encoded, "input", len(body.inputs))

    def written() -> dict[str, Any]:
        return {
            "id": f"{id_prefix}-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model,
            "data": told(pooled),
            "usage": usage(pooled),
        }

    return await answered(pooled, written)


async def pooled_of(
    request: Request,
    service: Service,
    body: WholeBody,
    encode: Callable[[], Awaitable[Encoded]],
    param: str,
    num_at_once: int,
) -> Pooled:
    """What comes of the inputs that `encode` makes, for the request's own caller and as it asks. See `PoolingTask`."""
    task = PoolingTask(
        model=body.model,
        encode=encode,
        param=param,
        num_at_once=num_at_once,
        operation=request.scope["route"].path.rpartition("/")[2],
        adapters=terms_of(service, body),
        cache_salt=salt_of(request, body.cache_salt),
        urgency=urgency_of(request, body.priority),
        asker=asker_of(request, body.user),
    )
    return await until_disconnect(request.receive, pool(service, task))


async def answered(pooled: Pooled, written: Callable[[], dict[str, Any]]) -> Response:
    """What is `written` of it, as JSON: off the event loop where it is long."""
    is_long = sum(part.size for part in pooled.vectors) > _LONG_NUMBERS
    content = await asyncio.to_thread(lambda: to_json(written())) if is_long else to_json(written())
    return Response(content, headers=adapter_headers(pooled.records), media_type="application/json")


def truncation_of(service: Service, body: WholeBody) -> Truncation | None:
    """What is kept of each input, if they are cut. Raises RequestError for more than the context holds."""
    wanted, most = body.truncate_prompt_tokens, service.max_model_len
    if wanted is None:
        return None
    if wanted != WHAT_FITS and not 1 <= wanted <= most:
        message = f"truncate_prompt_tokens may be 1 to {most}, what this model's context holds, or -1 for just that"
        raise RequestError("invalid_request", message, "truncate_prompt_tokens")
    return Truncation(most if wanted == WHAT_FITS else wanted, body.truncation_side == "left")


def _check(body: InputBody) -> None:
    for number, one in enumerate(body.inputs):
        if not one:
            param = body.input_param(number)
            raise RequestError("invalid_request", f"{param} is empty: send some text, or leave it out", param)


def usage(pooled: Pooled) -> dict[str, Any]:
    """Token counts over all inputs."""
    return {
        "prompt_tokens": pooled.num_prompt_tokens,
        "total_tokens": pooled.num_prompt_tokens,
        "prompt_tokens_details": {"cached_tokens": pooled.num_cached_tokens},
    }
