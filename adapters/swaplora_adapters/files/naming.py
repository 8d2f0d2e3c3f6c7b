"""What an adapter and an alias may be called, and what an adapter's two files are called."""

import re

from swaplora_adapters.errors import InvalidAdapterNameError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_NAME_CHARS = 128
MAX_SAID_CHARS = 63 + 1 + MAX_NAME_CHARS  # with whose it is
TENANT = "[a-z0-9][a-z0-9-]{0,62}"
TENANT_MARK = "~"  # behind the tenant, in what its names are stored as; in no name itself
DEFAULT_TENANT = "default"  # whose names are stored as they are
_TENANT = re.compile(TENANT + TENANT_MARK)
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)+")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def validate_name(name: str) -> str:
    """Return `name` if an adapter may have it, else raise InvalidAdapterNameError."""
    if _NAME.fullmatch(name):
        return name
    raise InvalidAdapterNameError(
        "an adapter's name is 1 to 128 ASCII letters, digits, dots, dashes or underscores, "
        "and starts with a letter or digit"
    )


def validate_alias(alias: str) -> str:
    """Return `alias` if it may be one: a name, or several with slashes between them, as repositories have.

    None begins with a dot, or has one behind a slash. Raises InvalidAdapterNameError.
    """
    return alias if is_repository(alias) else validate_name(alias)


def is_repository(name: str) -> bool:
    """Whether it is `org/name`, and what it is stored as is no longer than a name may be."""
    return len(stored_name(name)) <= MAX_NAME_CHARS and _REPOSITORY.fullmatch(name) is not None


def stored_name(name: str) -> str:
    """What an adapter that others call `org/name` is called here, as in the hub's own cache. Two may share it."""
    return name.replace("/", "--")


def tenant_of(stored: str) -> str:
    """Whose a name or an alias is; "" for the default tenant."""
    return stored.partition(TENANT_MARK)[0] if TENANT_MARK in stored else ""


def is_tenant(name: str) -> bool:
    """Whether a tenant may be called so."""
    return _TENANT.fullmatch(name + TENANT_MARK) is not None


def without_tenant(stored: str) -> str:
    """What a name or an alias is called by whose it is."""
    match = _TENANT.match(stored)
    return stored if match is None else stored[match.end() :]
