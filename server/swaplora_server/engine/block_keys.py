"""The prefix cache's keys: a full block is known by its tokens, all tokens before them, and whose they are.

A block's keys and values depend on every token up to its last and on the weights. So its key is the hash of its
parent's key and its own tokens, and the chain begins with a root that stands for the weights and for the client's salt.
Never a name: a name that is replaced has another root from then on. The base is the same for all that share a pool.
SHA-256 over an unambiguous form of all of it: equal keys mean equal content, whatever clients may try.
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence


def root_key(adapters: Iterable[tuple[str, float]], salt: str | None) -> bytes:
    """Where a chain begins: the digests and scales of its adapters, in order, and the salt. No adapters: the base.

    In place of a digest stands the key of what is more than that: a member of a mixture.
    """
    terms = [(digest, float(scale).hex()) for digest, scale in adapters]
    return hashlib.sha256(b"root" + json.dumps([terms, salt]).encode()).digest()


def invoked_key(parent: bytes, root: bytes, position: int) -> bytes:
    """What stands for `parent` from the block on in which an adapter is invoked, whose own chain begins with `root`."""
    return hashlib.sha256(b"invoked" + parent + root + array("q", [position]).tobytes()).digest()


def block_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a block of `token_ids` that comes after the block, or the root, of key `parent`."""
    return hashlib.sha256(b"block" + parent + array("q", token_ids).tobytes()).digest()
