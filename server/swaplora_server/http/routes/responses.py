"""POST /v1/responses: OpenAI's newer way to ask for one answer. Nothing is kept: a request brings all that was said."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from swaplora_server.access.caller import KeyScope
from swaplora_server.http.auth import needs
from swaplora_server.http.dependencies import Serving
from swaplora_server.http.described import NUMBER, OBJECTS, TEXT, object_of, streamed
from swaplora_server.http.dialogue.answers import answer_dialogue, check_one_answer, prompt_of
from swaplora_server.http.dialogue.response_teller import ResponseTeller
from swaplora_server.http.dialogue.response_wire import ResponseBody
from swaplora_server.http.refusals import RESPONSE, refuse_unsupported
from swaplora_server.http.transport.body import body_schema, json_body

router = APIRouter()
_RESPONSE = object_of(id=TEXT, object=TEXT, created_at=NUMBER, model=TEXT, status=TEXT, output=OBJECTS)


@router.post("/v1/responses", openapi_extra=body_schema(ResponseBody), responses=streamed(_RESPONSE))
@needs(KeyScope.GENERATE)
async def respond(
    request: Request, service: Serving, body: Annotated[ResponseBody, Depends(json_body(ResponseBody))]
) -> Response:
    """Answer what was said so far."""
    refuse_unsupported(body, RESPONSE)
    check_one_answer(body)
    use = body.tool_use()
    encode = prompt_of(service, body, body.turns(), use, body.variables)
    return await answer_dialogue(request, service, body, encode, body.max_output_tokens, use, ResponseTeller(body))
