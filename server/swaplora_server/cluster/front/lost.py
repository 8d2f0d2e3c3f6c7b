"""How a stream ends whose replica was lost: with an error, in the shape of its API."""

import re

from swaplora_server.http.dialogue.message_teller import anthropic_error
from swaplora_server.http.errors import error_body
from swaplora_server.http.sse import DONE, event, named_event
from swaplora_server.service.errors import RequestError

# that of a whole answer, in any of these shapes
LAST_EVENT = re.compile(
    rb"^(data: \[DONE\]|event: (message_stop|error|response\.(completed|incomplete|failed)))$", re.MULTILINE
)


def last_event(path: str, error: RequestError, num_events: int) -> bytes:
    """What ends the stream that answers a request to `path`, after `num_events` events."""
    told = error_body(error.code, error.message)
    if path == "/v1/messages":
        last = named_event("error", anthropic_error(500, error.message))
    elif path == "/v1/responses":
        fields = {key: told["error"][key] for key in ("code", "message", "param")}
        last = named_event("error", {"type": "error", "sequence_number": num_events, **fields})
    else:
        last = f"{event(told)}{DONE}"
    return last.encode()
