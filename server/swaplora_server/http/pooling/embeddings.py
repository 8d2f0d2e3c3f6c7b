"""POST /v1/embeddings."""

import asyncio
import base64
import time
import uuid
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic_core import to_json
from starlette.responses import Response

from swaplora_server.access.caller import KeyScope
from swaplora_server.engine.request import Vector
from swaplora_server.http.answers import adapter_headers
from swaplora_server.http.auth import needs
from swaplora_server.http.dependencies import Serving
from swaplora_server.http.foreign.names import terms_of
from swaplora_server.http.pooling.wire import WHAT_FITS, EmbeddingBody, PoolingBody
from swaplora_server.http.refusals import EMBEDDING, refuse_unsupported
from swaplora_server.http.sse import until_disconnect
from swaplora_server.http.tasks import asker_of, salt_of
from swaplora_server.http.transport.body import body_schema, json_body
from swaplora_server.service.errors import RequestError
from swaplora_server.service.pooling.embeddings import check_dimensions, embeddings
from swaplora_server.service.pooling.pooling import Pooled, PoolingTask, pool
from swaplora_server.service.prompts import Truncation
from swaplora_server.service.service import Service

router = APIRouter()
_LONG_NUMBERS = 4096  # an answer with more is written off the event loop


@router.post("/v1/embeddings", openapi_extra=body_schema(EmbeddingBody))
@needs(KeyScope.GENERATE)
async def embed(
    request: Request, service: Serving, body: Annotated[EmbeddingBody, Depends(json_body(EmbeddingBody))]
) -> Response:
    """A vector of each input."""
    refuse_unsupported(body, EMBEDDING)
    service.check_serving()
    _check(body)
    check_dimensions(service, body.dimensions)
    pooled = await until_disconnect(request.receive, pool(service, _task(request, service, body)))
    write = partial(_written, service, body, pooled)
    is_long = sum(map(len, pooled.vectors)) > _LONG_NUMBERS
    content = await asyncio.to_thread(write) if is_long else write()
    return Response(content, headers=adapter_headers(pooled.records), media_type="application/json")


def _check(body: EmbeddingBody) -> None:
    for number, one in enumerate(body.inputs):
        if not one:
            param = body.input_param(number)
            raise RequestError("invalid_request", f"{param} is empty: send some text, or leave it out", param)


def truncation_of(service: Service, body: PoolingBody) -> Truncation | None:
    """What is kept of each input, if they are cut. Raises RequestError for more than the context holds."""
    wanted, most = body.truncate_prompt_tokens, service.max_model_len
    if wanted is None:
        return None
    if wanted != WHAT_FITS and not 1 <= wanted <= most:
        message = f"truncate_prompt_tokens may be 1 to {most}, what this model's context holds, or -1 for just that"
        raise RequestError("invalid_request", message, "truncate_prompt_tokens")
    return Truncation(most if wanted == WHAT_FITS else wanted, body.truncation_side == "left")


def _task(request: Request, service: Service, body: EmbeddingBody) -> PoolingTask:
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
        reads=service.base.pooling,
        adapters=terms_of(service, body),
        cache_salt=salt_of(request, body.cache_salt),
        asker=asker_of(request, body.user),
        input_param=body.input_param,
    )


def _written(service: Service, body: EmbeddingBody, pooled: Pooled) -> bytes:
    normalises = service.base.pooling.normalises if body.normalize is None else body.normalize
    vectors = embeddings(pooled.vectors, body.dimensions, normalises=normalises)
    written = _base64 if body.encoding_format == "base64" else _floats
    return to_json(
        {
            "id": f"embd-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model,
            "data": [
                {"object": "embedding", "index": index, "embedding": written(vector)}
                for index, vector in enumerate(vectors)
            ],
            "usage": usage(pooled),
        }
    )


def usage(pooled: Pooled) -> dict[str, Any]:
    """Token counts over all inputs."""
    return {
        "prompt_tokens": pooled.num_prompt_tokens,
        "total_tokens": pooled.num_prompt_tokens,
        "prompt_tokens_details": {"cached_tokens": pooled.num_cached_tokens},
    }


def _floats(vector: Vector) -> list[float]:
    numbers: list[float] = vector.tolist()
    return numbers


def _base64(vector: Vector) -> str:
    """Of its float32, little-endian."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
