"""POST /v1/embeddings."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from swaplora_server.access.caller import KeyScope
from swaplora_server.http.auth import needs
from swaplora_server.http.dependencies import Serving
from swaplora_server.http.described import TEXT, VECTOR, listed_as
from swaplora_server.http.pooling.inputs import answer_inputs
from swaplora_server.http.pooling.numbers import written_as
from swaplora_server.http.pooling.wire import EmbeddingBody
from swaplora_server.http.refusals import EMBEDDING, refuse_unsupported
from swaplora_server.http.transport.body import body_schema, json_body
from swaplora_server.service.pooling.embeddings import check_dimensions, embeddings
from swaplora_server.service.pooling.pooling import Pooled

router = APIRouter()


@router.post(
    "/v1/embeddings", openapi_extra=body_schema(EmbeddingBody), responses=listed_as(object=TEXT, embedding=VECTOR)
)
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
    written = written_as(body.encoding_format)

    def told(pooled: Pooled) -> list[dict[str, Any]]:
        vectors = embeddings(pooled.vectors, body.dimensions, normalises=normalises)
        return [
            {"object": "embedding", "index": index, "embedding": written(vector)}
            for index, vector in enumerate(vectors)
        ]

    return await answer_inputs(request, service, body, lambda _uses: pooling, "embd", told)
