"""POST /tokenize and /detokenize, GET /tokenizer_info: texts as token ids and back, in vLLM's shapes."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import Discriminator, Field, RootModel, Tag
from starlette.responses import JSONResponse

from swaplora_server.access.caller import KeyScope
from swaplora_server.http.auth import needs
from swaplora_server.http.dependencies import Serving
from swaplora_server.http.described import NUMBER, TEXT, answers, object_of
from swaplora_server.http.foreign.fields import MAX_MODEL_CHARACTERS
from swaplora_server.http.refusals import ANYWHERE, CHAT, refuse_unsupported
from swaplora_server.http.routes.chat import check_messages, prompt_of
from swaplora_server.http.routes.models import check_model, check_named
from swaplora_server.http.sse import until_disconnect
from swaplora_server.http.transport.body import body_schema, json_body
from swaplora_server.http.transport.models import BRANCH, Body, WireModel
from swaplora_server.http.wire import MAX_PROMPT_TOKENS, ChatBody, TokenId
from swaplora_server.service.generating.checks import check_ids
from swaplora_server.service.service import Service

router = APIRouter()
_TOKENS = object_of(count=NUMBER, max_model_len=NUMBER, tokens={"type": "array", "items": NUMBER})
_CHAT, _TEXT = f"{BRANCH}chat", f"{BRANCH}text"


AnyName = Annotated[str, Field(max_length=MAX_MODEL_CHARACTERS)]  # nobody's is anybody's: all have one tokenizer


class TextBody(WireModel):
    """A text, as /v1/completions would take it."""

    model: AnyName | None = None
    prompt: str
    add_special_tokens: bool | None = True
    return_token_strs: bool | None = False


class ConversationBody(ChatBody):
    """A conversation, as /v1/chat/completions would take it."""

    model: AnyName = ""
    return_token_strs: bool = False


def _kind(value: object) -> str | None:
    if not isinstance(value, dict) or ("messages" in value) == ("prompt" in value):
        return None
    return _CHAT if "messages" in value else _TEXT


class TokenizeBody(
    RootModel[
        Annotated[
            Annotated[ConversationBody, Tag(_CHAT)] | Annotated[TextBody, Tag(_TEXT)],
            Discriminator(_kind, "body", "give either messages or prompt, a text"),
        ]
    ],
    Body,
):
    """Either of the two."""

    has_content = True


class DetokenizeBody(WireModel):
    """Token ids."""

    has_content = True

    model: AnyName | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_PROMPT_TOKENS, fail_fast=True)]


@router.post("/tokenize", openapi_extra=body_schema(TokenizeBody), responses=answers(_TOKENS, 200))
@needs(KeyScope.GENERATE)
async def tokenize(
    request: Request, service: Serving, body: Annotated[TokenizeBody, Depends(json_body(TokenizeBody))]
) -> JSONResponse:
    """The token ids of a text or a conversation, and how many they are."""
    asked = body.root
    if isinstance(asked, ConversationBody):
        refuse_unsupported(asked, CHAT, asked.messages)
        check_messages(asked)
    else:
        refuse_unsupported(asked, ANYWHERE)
    service.check_serving()
    if isinstance(asked, ConversationBody):
        check_named(service, asked)
    else:
        check_model(service, asked.model)
    (token_ids,) = await until_disconnect(request.receive, _encoded(service, asked))
    told: dict[str, Any] = {
        "count": len(token_ids),
        "max_model_len": service.max_model_len,
        "tokens": list(token_ids),
        "token_strs": None,
    }
    if asked.return_token_strs:
        told["token_strs"] = await service.when_long(len(token_ids), partial(service.base.vocabulary.pieces, token_ids))
    return JSONResponse(told)


async def _encoded(service: Service, asked: TextBody | ConversationBody) -> Sequence[Sequence[int]]:
    if isinstance(asked, ConversationBody):
        return await prompt_of(service, asked)()
    has_special = asked.add_special_tokens is not False
    return await service.tokenizer.encode_all([asked.prompt], lambda _number: "prompt", add_special_tokens=has_special)


@router.post("/detokenize", openapi_extra=body_schema(DetokenizeBody), responses=answers(object_of(prompt=TEXT), 200))
@needs(KeyScope.GENERATE)
async def detokenize(
    request: Request, service: Serving, body: Annotated[DetokenizeBody, Depends(json_body(DetokenizeBody))]
) -> JSONResponse:
    """The text of token ids, special tokens by their names."""
    refuse_unsupported(body)
    service.check_serving()
    check_model(service, body.model)
    check_ids(service, body.tokens, "tokens")
    text = service.when_long(len(body.tokens), partial(service.base.vocabulary.text_of, body.tokens))
    return JSONResponse({"prompt": await until_disconnect(request.receive, text)})


@router.get("/tokenizer_info")
@needs(KeyScope.GENERATE)
async def tokenizer_info(service: Serving) -> dict[str, Any]:
    """What a client must know of the base's tokenizer to make prompts itself."""
    service.check_serving()
    tokenizer = service.base.tokenizer
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return {
        "tokenizer_class": type(tokenizer).__name__,
        **special,
        "model_max_length": service.max_model_len,
        "chat_template": tokenizer.chat_template,
    }
