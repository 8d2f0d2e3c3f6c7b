"""One thing that was looked at."""

import enum
from typing import NamedTuple


class Effect(enum.StrEnum):
    """What it means for a server."""

    FINE = "fine"
    SLOW = "slow"  # it serves, and could be faster or hold more
    FAILS = "fails"  # it would not start


class Finding(NamedTuple):
    """`subject` is what was looked at, `found` what is there, and `remark` what that means and what to do."""

    subject: str
    found: str
    remark: str = ""
    effect: Effect = Effect.FINE

    @classmethod
    def of(cls, subject: str, found: str, *remarks: str, effect: Effect = Effect.SLOW) -> "Finding":
        """With what is to be said of it, if anything is: then it has that effect."""
        said = "; ".join(remark for remark in remarks if remark)
        return cls(subject, found, said, effect if said else Effect.FINE)
