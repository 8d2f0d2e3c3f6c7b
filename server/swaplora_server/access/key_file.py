"""The file that keys lie in, as hashes: read whole or refused, replaced whole, changed by one command at a time.

A key is 256 random bits: nobody finds it by trying, and its SHA-256 says nothing of it. It needs no salt, which keeps
equal passwords from having equal hashes, and no slow hash, which makes guessing passwords dear.
"""

import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from filelock import FileLock
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from swaplora_adapters.files.naming import DEFAULT_TENANT, TENANT
from swaplora_server.access.caller import Caller, KeyScope
from swaplora_server.access.limits import NO_LIMITS, Limits, TenantLimits

KEY_BEGINS = "sk-"
MAX_FILE_BYTES = 16 << 20
_KEY_BYTES = 32
_LOCK_SECONDS = 10.0


class KeyFileError(RuntimeError):
    """The file of keys cannot be used; the message is for the operator, and holds nothing of a key."""


class UnknownKeyError(KeyFileError):
    """The file has no key of that id."""

    def __init__(self, path: Path, key_id: str) -> None:
        super().__init__(f"the key file {path} has no key {key_id}")
        self.key_id = key_id


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class StoredKey(_Closed):
    """A key, as its file has it."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    tenant: Annotated[str, Field(pattern=f"^{TENANT}$")] = DEFAULT_TENANT
    scopes: Annotated[tuple[KeyScope, ...], Field(min_length=1)]
    expires: AwareDatetime | None = None
    limits: Limits = Limits()
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class KeyFile(_Closed):
    """All of a file's keys, and the limits of tenants."""

    keys: tuple[StoredKey, ...] = ()
    tenants: dict[Annotated[str, Field(pattern=f"^{TENANT}$")], TenantLimits] = {}

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("id", "sha256"):
            values = [getattr(key, name) for key in self.keys]
            if len(set(values)) < len(values):
                raise ValueError(f"two keys have the same {name}")
        return self

    def caller(self, key: StoredKey) -> Caller:
        """Whom a request with one of these keys comes from."""
        limits = self.tenants.get(key.tenant, NO_LIMITS)
        return Caller(key.id, key.tenant, frozenset(key.scopes), key.limits, limits)


def digest_of(key: str) -> str:
    """What a key is known by."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(path: Path) -> KeyFile:
    """What the file holds, as YAML or JSON; a file with nothing in it has no keys. Raises KeyFileError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"cannot read the key file {path}: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise KeyFileError(f"the key file {path} is larger than {MAX_FILE_BYTES} bytes")
    try:
        return KeyFile.model_validate(_parsed(content.decode()) or {})
    except ValidationError as error:
        raise KeyFileError(f"the key file {path}: {_complaint(error)}") from None
    except (ValueError, RecursionError, yaml.YAMLError):  # whose words quote the file
        raise KeyFileError(f"the key file {path} is neither JSON nor YAML") from None


def create_key(
    path: Path,
    tenant: str,
    scopes: tuple[KeyScope, ...],
    expires: datetime | None = None,
    *,
    must_exist: bool = False,
) -> tuple[str, StoredKey]:
    """Make a key and add it to the file, which is made if need be, unless it `must_exist`. The key is kept nowhere.

    Raises KeyFileError.
    """
    key = KEY_BEGINS + secrets.token_urlsafe(_KEY_BYTES)
    stored = StoredKey(
        id=f"key-{secrets.token_hex(6)}", tenant=tenant, scopes=scopes, expires=expires, sha256=digest_of(key)
    )
    with _changing(path, must_exist=must_exist) as change:
        change(lambda keys: (*keys, stored))
    return key, stored


def revoke_key(path: Path, key_id: str) -> None:
    """Take a key out of the file. Raises KeyFileError; UnknownKeyError for one that is not there."""
    with _changing(path, must_exist=True) as change:
        if all(key.id != key_id for key in read_keys(path).keys):
            raise UnknownKeyError(path, key_id)
        change(lambda keys: tuple(key for key in keys if key.id != key_id))


Change = Callable[[tuple[StoredKey, ...]], tuple[StoredKey, ...]]


@contextmanager
def _changing(path: Path, *, must_exist: bool) -> Iterator[Callable[[Change], None]]:
    """What replaces the keys, while nobody else does. A file that cannot be read is not written over."""
    real = Path(os.path.realpath(path))

    def change(to: Change) -> None:
        found = read_keys(path) if must_exist or path.exists() else KeyFile()
        _replace(real, KeyFile(keys=to(found.keys), tenants=found.tenants))

    try:
        with FileLock(real.with_name(f".{real.name}.lock"), timeout=_LOCK_SECONDS, mode=0o600):
            yield change
    except TimeoutError:
        raise KeyFileError(f"another command changes the key file {path}; try again") from None
    except OSError as error:
        raise KeyFileError(f"cannot change the key file {path}: {error.strerror}") from error


def _replace(path: Path, content: KeyFile) -> None:
    """Durably, for its owner's eyes; what is there is replaced whole, or not at all."""
    text = yaml.safe_dump(content.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    descriptor, staged = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # of mode 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(staged)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _parsed(text: str) -> Any:
    return json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)


def _complaint(error: ValidationError) -> str:
    """The first thing wrong and where, without the value."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"]
