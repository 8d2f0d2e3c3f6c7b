"""What the service is asked to generate, made of a request's body and headers."""

import math

from starlette.requests import Request

from swaplora_adapters.files.naming import DEFAULT_TENANT
from swaplora_server.http.auth import caller_of
from swaplora_server.http.dependencies import peer_of
from swaplora_server.http.foreign.names import terms_of
from swaplora_server.http.wire import GenerationBody
from swaplora_server.service.adapter_mix import Asker
from swaplora_server.service.admission import Urgency
from swaplora_server.service.errors import RequestError
from swaplora_server.service.generating.task import Encode, GenerationTask
from swaplora_server.service.service import Service

TIMEOUT_HEADER = "X-Request-Timeout"
MAX_TIMEOUT_SECONDS = 86_400
_SESSION_HEADER = "x-session-id"


def task_of(
    request: Request,
    service: Service,
    body: GenerationBody,
    encode: Encode,
    *,
    num_prompts: int,
    max_tokens: int | None,
    num_logprobs: int | None = None,
    num_choices: int | None = None,
    num_prompt_logprobs: int | None = None,
    has_echo: bool = False,
) -> GenerationTask:
    """What the service is to generate for `body`. max_tokens None means as many as fit.

    `num_choices` of each prompt are made, if not n. Of each token of the prompts
    `num_prompt_logprobs` are wanted.
    """
    return GenerationTask(
        model=body.model,
        encode=encode,
        sampling=body.sampling(max_tokens or 1, num_logprobs, num_prompt_logprobs),
        num_prompts=num_prompts,
        adapters=terms_of(service, body),
        max_tokens=max_tokens,
        ignore_eos=body.ignore_eos,
        n=num_choices or body.n,
        stops=body.stops,
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        has_echo=has_echo,
        is_streamed=body.stream,
        cache_salt=salt_of(request, body.cache_salt),
        urgency=urgency_of(request, body.priority),
        format=body.format_source(),
        asker=asker_of(request, body.user),
        operation=body.operation,
        prompt_param=body.prompt_param,
        length_param=body.length_param,
    )


def asker_of(request: Request, user: str | None) -> Asker:
    """Whoever wants an answer; a session's name goes before a user's."""
    client = request.headers.get(_SESSION_HEADER) or user or None  # an empty one names nobody
    return Asker(client, peer_of(request))


def urgency_of(request: Request, priority: int) -> Urgency:
    """How soon it is to be done. Raises RequestError for a time limit that is none."""
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return Urgency(priority)
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT_SECONDS:
        message = f"{TIMEOUT_HEADER} must be a number of seconds, more than 0 and at most {MAX_TIMEOUT_SECONDS}"
        raise RequestError("invalid_request", message, TIMEOUT_HEADER)
    return Urgency(priority, seconds)


def salt_of(request: Request, given: str | None) -> str | None:
    """What keeps tenants' prompts apart in the prefix cache, and clients' that ask for it; no two pairs have one."""
    tenant = caller_of(request).tenant
    if tenant == DEFAULT_TENANT:
        return given and f"\0{given}"
    return f"{tenant}\0{given or ''}"
