"""From a request's texts to a score of each document, whichever route asks."""

from starlette.requests import Request

from swaplora_server.http.pooling.inputs import pooled_of, truncation_of
from swaplora_server.http.pooling.score_wire import GivenTexts, ScoringBody
from swaplora_server.service.errors import RequestError
from swaplora_server.service.pooling.pooling import Pooled
from swaplora_server.service.pooling.scores import ScoredTexts, Texts, scores
from swaplora_server.service.prompts import Truncation
from swaplora_server.service.service import Service


async def scored(request: Request, service: Service, body: ScoringBody) -> tuple[Pooled, list[float]]:
    """What was computed, and the score of each of the second texts. Raises RequestError."""
    first, second = body.first, body.second
    num_first, num_second = len(first.texts), len(second.texts)
    if num_first not in (1, num_second):
        message = f"{first.field} has {num_first} texts and {second.field} {num_second}: send one, or as many"
        raise RequestError("invalid_request", message, first.field)
    for given in (first, second):
        _check_texts(given)
    truncation = truncation_of(service, body)

    async def encoded() -> ScoredTexts:
        return ScoredTexts(
            service,
            await _encoded(service, first, "max_tokens_per_query", body.max_tokens_per_query, truncation),
            await _encoded(service, second, "max_tokens_per_doc", body.max_tokens_per_doc, truncation),
            truncation,
        )

    pooled = await pooled_of(request, service, body, encoded, second.field, num_second)
    return pooled, scores(service, pooled, num_first, activates=body.use_activation)


def _check_texts(given: GivenTexts) -> None:
    for number, text in enumerate(given.texts):
        if not text:
            param = given.param(number)
            raise RequestError("invalid_request", f"{param} is empty: send some text, or leave it out", param)


async def _encoded(
    service: Service, given: GivenTexts, limit_field: str, limit: int, truncation: Truncation | None
) -> Texts:
    """Without special tokens, and of each text no more than may be kept of it. Raises RequestError."""
    if limit > service.max_model_len:
        message = (
            f"{limit_field} may be 1 to {service.max_model_len}, what this model's context holds, or 0 for no limit"
        )
        raise RequestError("invalid_request", message, limit_field)
    token_ids = await service.tokenizer.encode_all(
        given.texts, given.param, add_special_tokens=False, truncation=Truncation(limit) if limit else truncation
    )
    return Texts(token_ids, given.param)
