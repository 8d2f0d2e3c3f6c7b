"""How much a JSON text is to parse, told from its bytes: parsing holds up every thread, however it is done."""

from swaplora_server.http.errors import ApiError

MAX_ITEMS = 2**20  # of lists and objects together: that many token ids are parsed in a tenth of a second
MAX_NODES = 2**17  # lists, objects, and names in objects, each of which costs ten times as much
MAX_ESCAPES = 2**22  # a text without them is parsed at the speed of memory


def check_weight(raw: bytes | bytearray) -> None:
    """Raise ApiError for JSON with more parts than a request of any use has. What is not JSON may pass."""
    if raw.count(b"\\") > MAX_ESCAPES:
        raise ApiError("invalid_request", f"the body has more than {MAX_ESCAPES} escapes: send its texts as UTF-8")
    if _is_light(raw):
        return
    outside = _outside_strings(raw)
    if outside is None or not _is_light(outside):
        message = f"the body has too many parts: at most {MAX_ITEMS} items, and {MAX_NODES} lists, objects and names"
        raise ApiError("invalid_request", message)


def _is_light(raw: bytes | bytearray) -> bool:
    return raw.count(b",") <= MAX_ITEMS and sum(raw.count(mark) for mark in (b"[", b"{", b":")) <= MAX_NODES


def _outside_strings(raw: bytes | bytearray) -> bytes | bytearray | None:
    """All that is not in a string; None if there are more strings than items and names may be."""
    unescaped = raw.replace(b"\\\\", b"").replace(b'\\"', b"")  # so that every quote begins or ends a string
    if unescaped.count(b'"') > 2 * (MAX_ITEMS + MAX_NODES + 1):
        return None
    return b"".join(unescaped.split(b'"')[::2])
