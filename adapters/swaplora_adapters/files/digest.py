"""An adapter's identity: one sha256 over what its config means and what its weights file holds."""

import hashlib
import os
import re
from pathlib import Path

from swaplora_adapters.files.disk import open_regular
from swaplora_adapters.priority import pause

_PREFIX = "sha256:"
_DIGEST = re.compile(_PREFIX + "[0-9a-f]{64}")
_CHUNK_BYTES = 1 << 18


def digest_of(canonical: bytes, weights_path: Path) -> str:
    """`sha256:` and 64 hex digits over both parts, each preceded by its length in bytes as a 64-bit little-endian."""
    sha256 = hashlib.sha256(len(canonical).to_bytes(8, "little") + canonical)
    with open_regular(weights_path) as file:
        sha256.update(os.fstat(file.fileno()).st_size.to_bytes(8, "little"))
        while chunk := file.read(_CHUNK_BYTES):
            pause()
            sha256.update(chunk)
    return _PREFIX + sha256.hexdigest()


def hex_of(digest: str) -> str:
    """The 64 hex digits of a digest, safe as a folder's name; ValueError if it is none."""
    if not _DIGEST.fullmatch(digest):
        raise ValueError("a digest is sha256: and 64 lower-case hex digits")
    return digest.removeprefix(_PREFIX)


def is_hex(text: str) -> bool:
    """Whether it is what `hex_of` makes of some digest."""
    return _DIGEST.fullmatch(_PREFIX + text) is not None
