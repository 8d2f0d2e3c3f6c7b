"""Where in a prompt an activated adapter (aLoRA, arXiv 2504.12397) begins to apply."""

from collections.abc import Sequence

from swaplora_server.engine.request import AdapterUse
from swaplora_server.service.errors import RequestError


def invoked_at(prompt: Sequence[int], uses: Sequence[AdapterUse], param: str = "prompt") -> int:
    """The first token that the adapter applies to: where its invocation stands for the last time; 0 for other kinds.

    Raises RequestError, with `param` for the prompt, for one without the invocation, which the base alone would answer.
    """
    for use in uses:
        if invocation := use.weights.invocation:
            return _last(prompt, invocation, param)
    return 0


def _last(prompt: Sequence[int], invocation: Sequence[int], param: str) -> int:
    for start in range(len(prompt) - len(invocation), -1, -1):
        if tuple(prompt[start : start + len(invocation)]) == tuple(invocation):
            return start
    message = f"the prompt lacks the tokens {list(invocation)} that invoke the adapter; without them it does not apply"
    raise RequestError("invalid_request", message, param)
