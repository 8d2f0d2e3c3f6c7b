"""POST /classify and /v1/classify, in vLLM's shape: a label of each input, and a probability of each label."""

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from swaplora_server.access.caller import KeyScope
from swaplora_server.http.auth import needs
from swaplora_server.http.dependencies import Serving
from swaplora_server.http.described import NUMBER, REALS, TEXT, listed_as
from swaplora_server.http.pooling.inputs import answer_inputs
from swaplora_server.http.pooling.wire import ClassifyBody
from swaplora_server.http.refusals import EMBEDDING, refuse_unsupported
from swaplora_server.http.transport.body import body_schema, json_body
from swaplora_server.service.pooling.classes import classified
from swaplora_server.service.pooling.heads import classifier, labels_of
from swaplora_server.service.pooling.pooling import Pooled

router = APIRouter()
_DESCRIBED: dict[str, Any] = {
    "openapi_extra": body_schema(ClassifyBody),
    "responses": listed_as(label=TEXT, probs=REALS, num_classes=NUMBER),
}


@router.post("/classify", **_DESCRIBED)
@router.post("/v1/classify", **_DESCRIBED)
@needs(KeyScope.GENERATE)
async def classify(
    request: Request, service: Serving, body: Annotated[ClassifyBody, Depends(json_body(ClassifyBody))]
) -> Response:
    """The label of each input, by the head of an adapter or the base."""
    refuse_unsupported(body, EMBEDDING)
    service.check_serving()

    def told(pooled: Pooled) -> list[dict[str, Any]]:
        labels = labels_of(service.base, pooled.uses)
        found = [classified(logits, labels, activates=body.use_activation) for logits in pooled.vectors]
        return [
            {"index": index, "label": one.label, "probs": one.scores.tolist(), "num_classes": len(one.scores)}
            for index, one in enumerate(found)
        ]

    return await answer_inputs(request, service, body, partial(classifier, service.base), "classify", told)
