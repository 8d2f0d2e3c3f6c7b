"""POST /v1/completions."""

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
from swaplora_server.http.logprobs import LegacyLogprobs
from swaplora_server.http.refusals import COMPLETION, refuse_unsupported
from swaplora_server.http.sse import until_disconnect
from swaplora_server.http.tasks import task_of
from swaplora_server.http.transport.body import body_schema, json_body
from swaplora_server.http.wire import DEFAULT_MAX_TOKENS, CompletionBody
from swaplora_server.service.detokenize import TextToken
from swaplora_server.service.errors import RequestError
from swaplora_server.service.generation import Piece, generate
from swaplora_server.service.service import Service

router = APIRouter()


@router.post("/v1/completions", openapi_extra=body_schema(CompletionBody), responses=GENERATED)
@needs(KeyScope.GENERATE)
async def complete(
    request: Request, service: Serving, body: Annotated[CompletionBody, Depends(json_body(CompletionBody))]
) -> Response:
    """Continue each prompt."""
    return await answer_completion(request, service, body)


async def answer_completion(request: Request, service: Service, body: CompletionBody) -> Response:
    """See POST /v1/completions."""
    refuse_unsupported(body, COMPLETION)
    _check(body)
    service.check_serving()
    encode = partial(
        service.tokenizer.encode_all, body.prompts, body.prompt_param, add_special_tokens=body.add_special_tokens
    )
    num_choices = body.best_of or body.n
    task = task_of(
        request,
        service,
        body,
        encode,
        num_prompts=len(body.prompts),
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        num_logprobs=0 if body.logprobs is None and num_choices > body.n else body.logprobs,
        num_prompt_logprobs=_num_prompt_logprobs(body),
        num_choices=num_choices,
        has_echo=body.echo,
    )
    generation = await until_disconnect(request.receive, generate(service, task))
    form = _format(service.base.vocabulary, has_logprobs=body.logprobs is not None)
    return await answer(request, body, generation, form, num_choices)


def _num_prompt_logprobs(body: CompletionBody) -> int | None:
    """What is asked for of the prompts, one way or another: an echo has the logprobs that the answer has."""
    asked = (body.prompt_logprobs, body.logprobs if body.echo else None)
    return max((number for number in asked if number is not None), default=None)


def _check(body: CompletionBody) -> None:
    check_prompt_logprobs(body)
    if body.max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
        message = "max_tokens must be at least 1, unless echo is true; leave it out for the default"
        raise RequestError("invalid_request", message, "max_tokens")
    if body.best_of is not None and body.best_of < body.n:
        raise RequestError("invalid_request", "best_of must be at least n, of which it is the choice", "best_of")
    if body.stream and (body.best_of or 0) > body.n:
        message = "best_of is known when all have ended: leave stream out, or ask for n alone"
        raise RequestError("invalid_request", message, "best_of")


def _format(vocabulary: Vocabulary, *, has_logprobs: bool) -> AnswerFormat:
    """Completions' objects; logprobs name tokens, so the vocabulary is needed."""
    legacy = LegacyLogprobs(vocabulary)

    def logprobs(index: int, tokens: Sequence[TextToken], ending: TextToken | None) -> dict[str, Any] | None:
        return legacy.of(index, [*tokens, ending] if ending else tokens) if has_logprobs else None

    def choice(choice: Choice) -> dict[str, Any]:
        said = logprobs(choice.index, choice.tokens, choice.ending)
        return {"index": choice.index, "text": choice.text, "logprobs": said, "finish_reason": choice.finish_reason}

    def chunks(piece: Piece) -> list[dict[str, Any]]:
        said = logprobs(piece.choice, piece.tokens, piece.ending) if piece.tokens or piece.ending else None
        return [{"index": piece.choice, "text": piece.text, "logprobs": said, "finish_reason": piece.finish_reason}]

    return AnswerFormat("cmpl", "text_completion", "text_completion", choice, chunks, opening=None)
