"""POST /score and /v1/score, in vLLM's shape: how well each text goes with another."""

import time
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from swaplora_server.access.caller import KeyScope
from swaplora_server.http.auth import needs
from swaplora_server.http.dependencies import Serving
from swaplora_server.http.described import REAL, TEXT, listed_as
from swaplora_server.http.pooling.inputs import answered, usage
from swaplora_server.http.pooling.score_wire import ScoreBody
from swaplora_server.http.pooling.scoring import scored
from swaplora_server.http.refusals import SCORING, refuse_unsupported
from swaplora_server.http.transport.body import body_schema, json_body

router = APIRouter()
_DESCRIBED: dict[str, Any] = {
    "openapi_extra": body_schema(ScoreBody),
    "responses": listed_as(object=TEXT, score=REAL),
}


@router.post("/score", **_DESCRIBED)
@router.post("/v1/score", **_DESCRIBED)
@needs(KeyScope.GENERATE)
async def score(
    request: Request, service: Serving, body: Annotated[ScoreBody, Depends(json_body(ScoreBody))]
) -> Response:
    """By an adapter with a head of one label, of each pair; else by how alike embeddings are."""
    refuse_unsupported(body, SCORING)
    service.check_serving()
    pooled, scores = await scored(request, service, body)

    def written() -> dict[str, Any]:
        return {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model,
            "data": [{"index": index, "object": "score", "score": one} for index, one in enumerate(scores)],
            "usage": usage(pooled),
        }

    return await answered(pooled, written)
