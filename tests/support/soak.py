"""How much the long tests do: a few minutes' worth, or what `make soak` asks for."""

import os

# taken out of the environment, where a server started by a test would refuse it as a setting it does not know
_IS_SOAK = os.environ.pop("SWAPLORA_SOAK", "") == "1"


def size(ci: int, soak: int) -> int:
    """`soak` when the environment says SWAPLORA_SOAK=1, else `ci`."""
    return soak if _IS_SOAK else ci
