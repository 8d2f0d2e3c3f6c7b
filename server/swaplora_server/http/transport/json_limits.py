"""How much a JSON text is to parse, told from its bytes: parsing holds up every thread, however it is done."""

from swaplora_server.service.errors import RequestError

MAX_ITEMS = 2**19  # of lists and objects together: that many token ids are parsed in a twentieth of a second
MAX_NODES = 2**15  # lists, objects, and names in objects, each of which costs ten times as much
MAX_BARE_BYTES = 8 << 20  # outside of strings: numbers, and the space around them
MAX_ESCAPES = 2**22  # a text without them is parsed at the speed of memory


def check_limits(raw: bytes | bytearray) -> None:
    """Raise RequestError for JSON with more parts than a request of any use has. What is not JSON may pass."""
    num_escapes = raw.count(b"\\")
    if num_escapes > MAX_ESCAPES:
        raise RequestError("invalid_request", f"the body has more than {MAX_ESCAPES} escapes: send its texts as UTF-8")
    if _is_light(raw):
        return
    bare = _outside_strings(_without_escaped_quotes(raw) if num_escapes else raw)
    if bare is None or not _is_light(bare):
        raise RequestError(
            "invalid_request",
            f"the body has too many parts: at most {MAX_ITEMS} items, {MAX_NODES} lists, objects and names, and "
            f"{MAX_BARE_BYTES} bytes outside of strings",
        )


def _is_light(raw: bytes | bytearray) -> bool:
    return (
        len(raw) <= MAX_BARE_BYTES
        and raw.count(b",") <= MAX_ITEMS
        and sum(raw.count(mark) for mark in (b"[", b"{", b":")) <= MAX_NODES
    )


def _without_escaped_quotes(raw: bytes | bytearray) -> bytes | bytearray:
    return raw.replace(b"\\\\", b"").replace(b'\\"', b"")


def _outside_strings(raw: bytes | bytearray) -> bytes | bytearray | None:
    """All that is not in a string, of a text in which every quote begins or ends one.

    None if there are more strings than items and names may be.
    """
    if raw.count(b'"') > 2 * (MAX_ITEMS + MAX_NODES + 1):
        return None
    return b"".join(raw.split(b'"')[::2])
