"""POST /v1/embeddings."""

import base64
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from swaplora_server.access.caller import KeyScope
from swaplora_server.engine.request import Vector
from swaplora_server.http.auth import needs
from swaplora_server.http.dependencies import Serving
from swaplora_server.http.pooling.inputs import answer_pooled
from swaplora_server.http.pooling.wire import EmbeddingBody
from swaplora_server.http.refusals import EMBEDDING, refuse_unsupported
from swaplora_server.http.transport.body import body_schema, json_body
from swaplora_server.service.pooling.embeddings import check_dimensions, embeddings
from swaplora_server.service.pooling.pooling import Pooled

router = APIRouter()


@router.post("/v1/embeddings", openapi_extra=body_schema(EmbeddingBody))
@needs(KeyScope.GENERATE)
async def embed(
    request: Request, service: Serving, body: Annotated[EmbeddingBody, Depends(json_body(EmbeddingBody))]
) -> Response:
    """A vector of each input."""
    refuse_unsupported(body, EMBEDDING)
    service.check_serving()
    check_dimensions(service, body.dimensions)
    pooling = service.base.pooling
    normalises = pooling.normalises if body.normalize is None else body.normalize
    written = _base64 if body.encoding_format == "base64" else _floats

    def told(pooled: Pooled) -> list[dict[str, Any]]:
        vectors = embeddings(pooled.vectors, body.dimensions, normalises=normalises)
        return [
            {"object": "embedding", "index": index, "embedding": written(vector)}
            for index, vector in enumerate(vectors)
        ]

    return await answer_pooled(request, service, body, lambda _uses: pooling, "embd", told)


def _floats(vector: Vector) -> list[float]:
    numbers: list[float] = vector.tolist()
    return numbers


def _base64(vector: Vector) -> str:
    """Of its float32, little-endian."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
