"""Which target of an alias answers a request: at random by weight, or always the same one for the same client."""

import hashlib
import math
import random

from swaplora_adapters.store.records import Alias, Target

_HASH_BITS = 52  # as many as leave a float between 0 and 1 neither of the two


def choose(alias: Alias, client: str | None) -> Target:
    """One of the targets. `client` names who asks; None draws anew each time.

    Weighted rendezvous hashing (Mosharaf et al., "Weighted rendezvous hashing", 2014): a client changes its target only
    as far as the weights do, so that raising a canary from 10 to 20 moves a tenth of the clients and nobody back.
    """
    if client is None:
        return random.choices(alias.targets, [target.weight for target in alias.targets])[0]
    return max(alias.targets, key=lambda target: _score(alias.alias, client, target))


def _score(alias: str, client: str, target: Target) -> float:
    """-weight / ln(u) for a u in (0, 1) that only alias, client and target's reference decide."""
    text = "\0".join((alias, client, target.reference)).encode("utf-8", "surrogatepass")
    drawn = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> (64 - _HASH_BITS)
    return -target.weight / math.log((drawn + 0.5) / 2**_HASH_BITS)
