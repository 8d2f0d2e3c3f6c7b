"""What an adapter may be called, and what its two files are called."""

import re

from swaplora_adapters.errors import InvalidAdapterNameError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def validate_name(name: str) -> str:
    """Return `name` if an adapter may have it, else raise InvalidAdapterNameError."""
    if _NAME.fullmatch(name):
        return name
    raise InvalidAdapterNameError(
        "an adapter's name is 1 to 128 ASCII letters, digits, dots, dashes or underscores, "
        "and starts with a letter or digit"
    )
