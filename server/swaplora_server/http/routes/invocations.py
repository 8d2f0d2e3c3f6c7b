"""POST /invocations: SageMaker's one route for what a model does, here either of the two that generate."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import Discriminator, RootModel, Tag
from starlette.responses import Response

from swaplora_server.access.caller import KeyScope
from swaplora_server.http.auth import needs
from swaplora_server.http.dependencies import ADAPTER_HEADER, Serving
from swaplora_server.http.described import GENERATED
from swaplora_server.http.foreign.fields import MAX_MODEL_CHARACTERS, ModelName
from swaplora_server.http.routes.chat import answer_chat
from swaplora_server.http.routes.completions import answer_completion
from swaplora_server.http.transport.body import body_schema, json_body
from swaplora_server.http.transport.models import BRANCH, Body
from swaplora_server.http.wire import ChatBody, CompletionBody, GenerationBody
from swaplora_server.service.errors import RequestError
from swaplora_server.service.service import Service

router = APIRouter()
SESSION_HEADER = "X-Amzn-SageMaker-Session-Id"
_CHAT, _COMPLETION = f"{BRANCH}chat", f"{BRANCH}completion"


def _kind(value: object) -> str | None:
    if not isinstance(value, dict) or ("messages" in value) == ("prompt" in value):
        return None
    return _CHAT if "messages" in value else _COMPLETION


class InvokedChat(ChatBody):
    """A chat whose adapter the header may name."""

    model: ModelName = ""


class InvokedCompletion(CompletionBody):
    """A completion whose adapter the header may name."""

    model: ModelName = ""


class InvocationBody(
    RootModel[
        Annotated[
            Annotated[InvokedChat, Tag(_CHAT)] | Annotated[InvokedCompletion, Tag(_COMPLETION)],
            Discriminator(_kind, "body", "give either messages, for a chat, or prompt, for a text; no session is kept"),
        ]
    ],
    Body,
):
    """The body of either route."""

    has_content = takes_place = True


@router.post("/invocations", openapi_extra=body_schema(InvocationBody), responses=GENERATED)
@needs(KeyScope.GENERATE)
async def invoke(
    request: Request, service: Serving, body: Annotated[InvocationBody, Depends(json_body(InvocationBody))]
) -> Response:
    """Answer a conversation, or continue prompts; an adapter may be named by SageMaker's header too."""
    if SESSION_HEADER in request.headers:
        message = f"no session is kept here: leave {SESSION_HEADER} out; X-Session-Id keeps to one side of a split"
        raise RequestError("unsupported_field", message, SESSION_HEADER)
    named = _named(service, body.root, request.headers.get(ADAPTER_HEADER))
    if isinstance(named, ChatBody):
        return await answer_chat(request, service, named)
    assert isinstance(named, CompletionBody)
    return await answer_completion(request, service, named)


def _named(service: Service, body: GenerationBody, adapter: str | None) -> GenerationBody:
    """The body with the header's adapter as its model, where that is the base or not there.

    Raises RequestError for two names, for none, and for a header that is there and names nobody.
    """
    if adapter is None:
        if not body.model:
            raise RequestError("invalid_request", f"model: name it here, or an adapter in {ADAPTER_HEADER}", "model")
        return body
    if not adapter:
        raise RequestError("invalid_request", f"{ADAPTER_HEADER} is empty: leave it out for the base", ADAPTER_HEADER)
    if body.model and adapter != body.model and not service.is_base(body.model):
        message = f"{ADAPTER_HEADER} and model name different adapters; with the header, model is the base's id"
        raise RequestError("invalid_request", message, "model")
    if len(adapter) > MAX_MODEL_CHARACTERS:
        raise RequestError("model_not_found", f"{ADAPTER_HEADER} is longer than any name", "model")
    return body.model_copy(update={"model": adapter})
