"""The wording of complaints about untrusted files: names quoted safely, long lists cut."""

from collections.abc import Sequence

MAX_COMPLAINTS = 50
MAX_QUOTED_CHARS = 120


def quoted(text: str) -> str:
    """A name out of a file as one short line of ASCII, so that it can neither forge a log line nor flood an answer."""
    return ascii(text if len(text) <= MAX_QUOTED_CHARS else text[:MAX_QUOTED_CHARS] + "...")


def capped(complaints: Sequence[str]) -> list[str]:
    """The first `MAX_COMPLAINTS` complaints, and how many more there were."""
    if len(complaints) <= MAX_COMPLAINTS:
        return list(complaints)
    return [*complaints[:MAX_COMPLAINTS], f"... and {len(complaints) - MAX_COMPLAINTS} more"]
