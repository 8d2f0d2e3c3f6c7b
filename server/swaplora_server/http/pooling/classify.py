"""POST /classify and /v1/classify, in vLLM's shape: a label of each input, and a probability of each label."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from swaplora_server.access.caller import KeyScope
from swaplora_server.http.auth import needs
from swaplora_server.http.dependencies import Serving
from swaplora_server.http.pooling.inputs import answer_pooled
from swaplora_server.http.pooling.wire import ClassifyBody
from swaplora_server.http.refusals import EMBEDDING, refuse_unsupported
from swaplora_server.http.transport.body import body_schema, json_body
from swaplora_server.service.pooling.classes import classified, classifier
from swaplora_server.service.pooling.pooling import Pooled

router = APIRouter()


@router.post("/classify", openapi_extra=body_schema(ClassifyBody))
@router.post("/v1/classify", openapi_extra=body_schema(ClassifyBody))
@needs(KeyScope.GENERATE)
async def classify(
    request: Request, service: Serving, body: Annotated[ClassifyBody, Depends(json_body(ClassifyBody))]
) -> Response:
    """The label of each input, by an adapter with a head."""
    refuse_unsupported(body, EMBEDDING)
    service.check_serving()

    def told(pooled: Pooled) -> list[dict[str, Any]]:
        labels = pooled.uses[0].weights.labels
        found = [classified(logits, labels, activates=body.use_activation) for logits in pooled.vectors]
        return [
            {"index": index, "label": one.label, "probs": one.scores.tolist(), "num_classes": len(one.scores)}
            for index, one in enumerate(found)
        ]

    return await answer_pooled(request, service, body, classifier, "classify", told)
