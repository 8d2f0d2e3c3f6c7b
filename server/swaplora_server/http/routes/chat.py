"""POST /v1/chat/completions."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from swaplora_server.access.caller import KeyScope
from swaplora_server.base.vocabulary import Vocabulary
from swaplora_server.http.answers import AnswerFormat, Choice, answer, check_prompt_logprobs
from swaplora_server.http.auth import needs
from swaplora_server.http.dependencies import Serving
from swaplora_server.http.described import GENERATED
from swaplora_server.http.logprobs import chat_logprobs
from swaplora_server.http.refusals import CHAT, refuse_unsupported
from swaplora_server.http.sse import until_disconnect
from swaplora_server.http.tasks import task_of
from swaplora_server.http.tools.answers import ChatAnswers
from swaplora_server.http.tools.reading import as_read
from swaplora_server.http.transport.body import body_schema, json_body
from swaplora_server.http.wire import ChatBody
from swaplora_server.service.detokenize import TextToken
from swaplora_server.service.errors import RequestError
from swaplora_server.service.generating.task import Encode
from swaplora_server.service.generation import Piece, generate
from swaplora_server.service.service import Service

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=body_schema(ChatBody), responses=GENERATED)
@needs(KeyScope.GENERATE)
async def chat(request: Request, service: Serving, body: Annotated[ChatBody, Depends(json_body(ChatBody))]) -> Response:
    """Answer the conversation."""
    return await answer_chat(request, service, body)


async def answer_chat(request: Request, service: Service, body: ChatBody) -> Response:
    """See POST /v1/chat/completions."""
    refuse_unsupported(body, CHAT, body.messages)
    _check(body)
    service.check_serving()
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    task = task_of(
        request,
        service,
        body,
        prompt_of(service, body),
        num_prompts=1,
        max_tokens=max_tokens,
        num_logprobs=body.num_logprobs,
        num_prompt_logprobs=body.prompt_logprobs,
    )
    task, reading = as_read(task, service.dialect, body.tool_use())
    generation = await until_disconnect(request.receive, generate(service, task))
    read = None
    if not reading.is_plain:
        read = ChatAnswers(reading.use, reading.new_reader(generation), tells_thoughts=body.include_reasoning)
    form = _format(service.base.vocabulary, read, has_logprobs=body.logprobs, has_ids=body.return_token_ids)
    return await answer(request, body, generation, form)


def prompt_of(service: Service, body: ChatBody) -> Encode:
    """What makes the one prompt of the conversation, as the base's template writes it."""
    use = body.tool_use()
    return partial(
        service.render_chat,
        [message.as_template_input() for message in body.messages],
        body.chat_template_kwargs or {},
        body.prompt_param,
        add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
        continue_final_message=body.continue_final_message,
        add_special_tokens=body.add_special_tokens,
        tools=() if use is None else use.tools,
    )


def _check(body: ChatBody) -> None:
    check_prompt_logprobs(body)
    if body.top_logprobs and not body.logprobs:
        raise RequestError("invalid_request", "top_logprobs needs logprobs to be true", "top_logprobs")
    check_messages(body)


def check_messages(body: ChatBody) -> None:
    """Raise RequestError for a message that says nothing."""
    for number, message in enumerate(body.messages):
        if not message.says_something:
            path = f"messages[{number}].content"
            raise RequestError("invalid_request", f"{path} must be a string, or a list of parts of type text", path)


def _format(
    vocabulary: Vocabulary, read: ChatAnswers | None = None, *, has_logprobs: bool, has_ids: bool = False
) -> AnswerFormat:
    """Chat's objects; logprobs name tokens, so the vocabulary is needed."""

    def logprobs(tokens: Sequence[TextToken]) -> dict[str, Any]:
        return chat_logprobs(vocabulary, tokens)

    def choice(choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        reason: str | None = choice.finish_reason
        if read is not None:
            message, reason = read.message(choice.text, reason)
        return {
            "index": choice.index,
            "message": message,
            "logprobs": logprobs(choice.tokens) if has_logprobs else None,
            "finish_reason": reason,
        }

    def chunks(piece: Piece) -> list[dict[str, Any]]:
        reason: str | None = piece.finish_reason
        deltas = [{"content": piece.text}] if piece.text else []
        if read is not None:
            deltas = read.deltas(piece.choice, piece.text, is_last=reason is not None)
            reason = read.finish_reason(piece.choice, reason)
        has_token = piece.token_id is not None and (read is None or has_ids)
        if not deltas and (piece.tokens or has_token):
            deltas = [{"content": ""}]  # what is said of a token has no other place
        shown = [logprobs(piece.tokens) if piece.tokens else None, *[None] * len(deltas)]
        choices = [_delta(piece.choice, delta, logprobs=of) for delta, of in zip(deltas, shown, strict=False)]
        return choices if reason is None else [*choices, _delta(piece.choice, {}, finish_reason=reason)]

    def opening(index: int) -> dict[str, Any]:
        return _delta(index, {"role": "assistant", "content": ""})

    return AnswerFormat(
        "chatcmpl", "chat.completion", "chat.completion.chunk", choice, chunks, opening, one_prompt=True
    )


def _delta(
    index: int,
    delta: dict[str, Any],
    *,
    logprobs: dict[str, Any] | None = None,
    finish_reason: str | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
