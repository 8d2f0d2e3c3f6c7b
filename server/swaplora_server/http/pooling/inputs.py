"""What the service is asked to make of inputs, and what all of its answers have in common."""

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from swaplora_server.engine.pooling.kinds import Reader
from swaplora_server.engine.request import AdapterUse
from swaplora_server.http.answers import adapter_headers
from swaplora_server.http.foreign.names import terms_of
from swaplora_server.http.pooling.wire import WHAT_FITS, InputBody
from swaplora_server.http.sse import until_disconnect
from swaplora_server.http.tasks import asker_of, salt_of, urgency_of
from swaplora_server.service.errors import RequestError
from swaplora_server.service.pooling.pooling import Pooled, PoolingTask, pool
from swaplora_server.service.prompts import Truncation
from swaplora_server.service.service import Service

_LONG_NUMBERS = 4096  # an answer with more is written off the event loop
Reading = Callable[[Sequence[AdapterUse]], Reader]
Told = Callable[[Pooled], list[dict[str, Any]]]


async def answer_pooled(
    request: Request, service: Service, body: InputBody, reader: Reading, id_prefix: str, told: Told
) -> Response:
    """Have all inputs computed, and answer with what is `told` of each."""
    _check(body)
    pooled = await until_disconnect(request.receive, pool(service, _task(request, service, body, reader)))
    write = partial(_written, body, pooled, id_prefix, told)
    is_long = sum(part.size for part in pooled.vectors) > _LONG_NUMBERS
    content = await asyncio.to_thread(write) if is_long else write()
    return Response(content, headers=adapter_headers(pooled.records), media_type="application/json")


def truncation_of(service: Service, body: InputBody) -> Truncation | None:
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


def _task(request: Request, service: Service, body: InputBody, reader: Reading) -> PoolingTask:
    encode = partial(
        service.tokenizer.encode_all,
        body.inputs,
        body.input_param,
        add_special_tokens=body.add_special_tokens,
        truncation=truncation_of(service, body),
    )
    return PoolingTask(
        model=body.model,
        encode=encode,
        num_inputs=len(body.inputs),
        reader=reader,
        adapters=terms_of(service, body),
        cache_salt=salt_of(request, body.cache_salt),
        urgency=urgency_of(request, body.priority),
        asker=asker_of(request, body.user),
        input_param=body.input_param,
    )


def _written(body: InputBody, pooled: Pooled, id_prefix: str, told: Told) -> bytes:
    return to_json(
        {
            "id": f"{id_prefix}-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model,
            "data": told(pooled),
            "usage": _usage(pooled),
        }
    )


def _usage(pooled: Pooled) -> dict[str, Any]:
    """Token counts over all inputs."""
    return {
        "prompt_tokens": pooled.num_prompt_tokens,
        "total_tokens": pooled.num_prompt_tokens,
        "prompt_tokens_details": {"cached_tokens": pooled.num_cached_tokens},
    }
