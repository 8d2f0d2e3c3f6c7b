"""POST /v1/completions."""

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from swaplora_server.http.answers import AnswerFormat, Choice, answer
from swaplora_server.http.dependencies import Serving
from swaplora_server.http.refusals import COMPLETION, refuse_unsupported
from swaplora_server.http.sse import until_disconnect
from swaplora_server.http.tasks import task_of
from swaplora_server.http.transport.body import body_schema, json_body
from swaplora_server.http.wire import CompletionBody
from swaplora_server.service.generation import Piece, generate
from swaplora_server.service.service import Service

router = APIRouter()


@router.post("/v1/completions", openapi_extra=body_schema(CompletionBody))
async def complete(
    request: Request, service: Serving, body: Annotated[CompletionBody, Depends(json_body(CompletionBody))]
) -> Response:
    """Continue each prompt."""
    return await answer_completion(request, service, body)


async def answer_completion(request: Request, service: Service, body: CompletionBody) -> Response:
    """See POST /v1/completions."""
    refuse_unsupported(body, COMPLETION)
    service.check_serving()
    encode = partial(
        service.tokenizer.encode_all, body.prompts, body.prompt_param, add_special_tokens=body.add_special_tokens
    )
    task = task_of(request, body, encode, num_prompts=len(body.prompts), max_tokens=body.max_tokens or 16)
    generation = await until_disconnect(request.receive, generate(service, task))
    return await answer(request, body, generation, _FORMAT)


def _choice(choice: Choice) -> dict[str, Any]:
    return {"index": choice.index, "text": choice.text, "logprobs": None, "finish_reason": choice.finish_reason}


def _chunks(piece: Piece) -> list[dict[str, Any]]:
    return [{"index": piece.choice, "text": piece.text, "logprobs": None, "finish_reason": piece.finish_reason}]


_FORMAT = AnswerFormat("cmpl", "text_completion", "text_completion", _choice, _chunks, opening=None)
