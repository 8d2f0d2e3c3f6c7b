"""POST /v1/completions."""

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from swaplora_server.http.answers import AnswerFormat, Choice, answer
from swaplora_server.http.refusals import COMPLETION, refuse_unsupported
from swaplora_server.http.sse import to_json
from swaplora_server.http.transport.body import body_schema, json_body
from swaplora_server.http.wire import CompletionBody
from swaplora_server.service.generation import Piece, admit
from swaplora_server.service.service import Service

router = APIRouter()


@router.post("/v1/completions", openapi_extra=body_schema(CompletionBody))
async def complete(request: Request, body: Annotated[CompletionBody, Depends(json_body(CompletionBody))]) -> Response:
    """Continue each prompt."""
    return await answer_completion(request, body)


async def answer_completion(request: Request, body: CompletionBody) -> Response:
    """See POST /v1/completions."""
    refuse_unsupported(body, COMPLETION)
    service: Service = request.app.state.service
    service.check_serving()
    service.check_number(body.n, len(body.prompts))
    encode = partial(
        service.tokenizer.encode_all, body.prompts, body.prompt_param, add_special_tokens=body.add_special_tokens
    )
    admission = await admit(request, service, body, encode, max_tokens=body.max_tokens or 16)
    return await answer(request, body, admission, _FORMAT)


def _choice(choice: Choice) -> dict[str, Any]:
    return {"index": choice.index, "text": choice.text, "logprobs": None, "finish_reason": choice.finish_reason}


def _chunks(piece: Piece) -> list[str]:
    reason = "null" if piece.finish_reason is None else to_json(piece.finish_reason)
    return [f'{{"index":{piece.choice},"text":{to_json(piece.text)},"logprobs":null,"finish_reason":{reason}']


_FORMAT = AnswerFormat("cmpl", "text_completion", "text_completion", _choice, _chunks, opening=None)
