"""POST /pooling, in vLLM's shape: what is made of each input, as numbers alone."""

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from swaplora_server.access.caller import KeyScope
from swaplora_server.http.auth import needs
from swaplora_server.http.dependencies import Serving
from swaplora_server.http.described import TEXT, VECTOR, listed_as
from swaplora_server.http.pooling.inputs import answer_inputs
from swaplora_server.http.pooling.numbers import written_as
from swaplora_server.http.pooling.wire import PoolingBody
from swaplora_server.http.refusals import POOLING, refuse_unsupported
from swaplora_server.http.transport.body import body_schema, json_body
from swaplora_server.service.errors import RequestError
from swaplora_server.service.pooling.embeddings import check_dimensions
from swaplora_server.service.pooling.pooling import Pooled
from swaplora_server.service.pooling.tasks import finished, reader_of

router = APIRouter()


@router.post("/pooling", openapi_extra=body_schema(PoolingBody), responses=listed_as(object=TEXT, data=VECTOR))
@needs(KeyScope.GENERATE)
async def pooling(
    request: Request, service: Serving, body: Annotated[PoolingBody, Depends(json_body(PoolingBody))]
) -> Response:
    """A vector of each input or of each of its tokens, probabilities of labels, or the same of tokens."""
    refuse_unsupported(body, POOLING)
    service.check_serving()
    if body.dimensions is not None:
        _check_embeds(body)
        check_dimensions(service, body.dimensions)
    written = written_as(body.encoding_format)

    def told(pooled: Pooled) -> list[dict[str, Any]]:
        vectors = finished(service, pooled, body.dimensions, activates=body.use_activation)
        return [{"index": index, "object": "pooling", "data": written(vector)} for index, vector in enumerate(vectors)]

    return await answer_inputs(request, service, body, partial(reader_of, service, body.task), "pool", told)


def _check_embeds(body: PoolingBody) -> None:
    """Raise RequestError unless one vector of each input is asked for."""
    if body.task != "embed":
        raise RequestError("unsupported_field", "dimensions is for the task embed: leave it out", "dimensions")
