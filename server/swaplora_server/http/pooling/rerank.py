"""POST /rerank, /v1/rerank and /v2/rerank: documents by how well they go with a query, as Cohere and Jina shape it."""

import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from swaplora_server.access.caller import KeyScope
from swaplora_server.http.auth import needs
from swaplora_server.http.dependencies import Serving
from swaplora_server.http.described import NUMBER, OBJECT, REAL, TEXT, answers, object_of
from swaplora_server.http.pooling.inputs import answered, usage
from swaplora_server.http.pooling.score_wire import RerankBody
from swaplora_server.http.pooling.scoring import scored
from swaplora_server.http.refusals import SCORING, refuse_unsupported
from swaplora_server.http.transport.body import body_schema, json_body

router = APIRouter()
_RESULTS = {"type": "array", "items": object_of(index=NUMBER, relevance_score=REAL)}
_DESCRIBED: dict[str, Any] = {
    "openapi_extra": body_schema(RerankBody),
    "responses": answers(object_of(id=TEXT, object=TEXT, model=TEXT, results=_RESULTS, usage=OBJECT, meta=OBJECT), 200),
}


@router.post("/rerank", **_DESCRIBED)
@router.post("/v1/rerank", **_DESCRIBED)
@router.post("/v2/rerank", **_DESCRIBED)
@needs(KeyScope.GENERATE)
async def rerank(
    request: Request, service: Serving, body: Annotated[RerankBody, Depends(json_body(RerankBody))]
) -> Response:
    """The best document first, scored as by /score."""
    refuse_unsupported(body, SCORING)
    service.check_serving()
    pooled, scores = await scored(request, service, body)
    best = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n or None]
    texts = body.second.texts

    def written() -> dict[str, Any]:
        return {
            "id": f"rerank-{uuid.uuid4().hex}",
            "object": "list",
            "model": body.model,
            "results": [
                {
                    "index": index,
                    "relevance_score": scores[index],
                    **({"document": {"text": texts[index]}} if body.return_documents else {}),
                }
                for index in best
            ],
            "usage": usage(pooled),
            "meta": {"tokens": {"input_tokens": pooled.num_prompt_tokens, "output_tokens": 0}},
        }

    return await answered(pooled, written)
