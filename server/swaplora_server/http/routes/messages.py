"""POST /v1/messages: Anthropic's way to ask for one answer, its errors in Anthropic's shape."""

import json
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from swaplora_server.access.caller import KeyScope
from swaplora_server.http.auth import needs
from swaplora_server.http.dependencies import Serving
from swaplora_server.http.described import OBJECT, OBJECTS, TEXT, object_of, refused_as, streamed
from swaplora_server.http.dialogue.answers import answer_dialogue, check_one_answer, prompt_of
from swaplora_server.http.dialogue.message_teller import MessageTeller, anthropic_error
from swaplora_server.http.dialogue.message_wire import CountBody, MessagesBody
from swaplora_server.http.errors import RETRY_HEADERS, errors_told_by
from swaplora_server.http.refusals import ANTHROPIC, refuse_unsupported
from swaplora_server.http.routes.models import check_named
from swaplora_server.http.sse import until_disconnect
from swaplora_server.http.transport.body import body_schema, json_body
from swaplora_server.http.wire import MAX_STOP_CHARACTERS
from swaplora_server.service.errors import RequestError
from swaplora_server.service.generating.task import Encode
from swaplora_server.service.service import Service


def _as_anthropic(refused: JSONResponse) -> JSONResponse:
    """Our error as Anthropic tells it."""
    kept = {name: value for name, value in refused.headers.items() if name in RETRY_HEADERS}
    message = json.loads(bytes(refused.body))["error"]["message"]
    return JSONResponse(anthropic_error(refused.status_code, message), refused.status_code, headers=kept)


_REFUSED = refused_as(object_of(type={"const": "error"}, error=object_of(type=TEXT, message=TEXT)))
_MESSAGE = object_of(id=TEXT, type=TEXT, role=TEXT, model=TEXT, content=OBJECTS, usage=OBJECT)
router = APIRouter(route_class=errors_told_by(_as_anthropic), responses=_REFUSED)


@router.post("/v1/messages", openapi_extra=body_schema(MessagesBody), responses=streamed(_MESSAGE))
@needs(KeyScope.GENERATE)
async def create_message(
    request: Request, service: Serving, body: Annotated[MessagesBody, Depends(json_body(MessagesBody))]
) -> Response:
    """Answer the conversation."""
    named = body.model_copy(
        update={
            "stop": [*body.stops, *(body.stop_sequences or ())] or None,
            "user": body.user or (body.metadata.user_id if body.metadata else None),
        }
    )
    if "" in named.stops or sum(map(len, named.stops)) > MAX_STOP_CHARACTERS:
        message = f"stop_sequences: none may be empty, and all may have {MAX_STOP_CHARACTERS} characters together"
        raise RequestError("invalid_request", message, "stop_sequences")
    encode = _prompt_of(service, body)
    return await answer_dialogue(
        request,
        service,
        named,
        encode,
        body.max_tokens,
        body.tool_use(),
        MessageTeller(body.model, tells_thoughts=body.tells_thoughts),
    )


@router.post("/v1/messages/count_tokens", openapi_extra=body_schema(CountBody))
@needs(KeyScope.GENERATE)
async def count_tokens(
    request: Request, service: Serving, body: Annotated[CountBody, Depends(json_body(CountBody))]
) -> dict[str, int]:
    """How many tokens the conversation is."""
    encode = _prompt_of(service, body)
    service.check_serving()
    check_named(service, body)
    (token_ids,) = await until_disconnect(request.receive, encode())
    return {"input_tokens": len(token_ids)}


def _prompt_of(service: Service, body: CountBody) -> Encode:
    """What makes the prompt. A last message of the assistant is the beginning of the answer."""
    refuse_unsupported(body, ANTHROPIC)
    check_one_answer(body)
    turns = body.turns()
    return prompt_of(service, body, turns, body.tool_use(), body.variables, is_begun=turns[-1]["role"] == "assistant")
