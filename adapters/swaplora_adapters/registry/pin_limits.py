"""How much tenants may pin of the memory that all of them share: what is pinned is never evicted for another."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from swaplora_adapters.errors import QuotaExceededError
from swaplora_adapters.files.naming import DEFAULT_TENANT, tenant_of

SHARE_OF_TENANTS = 2  # half of the memory


class Pin(NamedTuple):
    """A version that is to stay in memory: what it is stored as, and what it takes."""

    name: str
    digest: str
    nbytes: int


class PinLimits:
    """The default tenant, which is the operator's own, may pin what there is memory for."""

    def __init__(self, budget: int, pinned_bytes: Callable[[str], int | None]) -> None:
        """`budget` is that of all adapters, `pinned_bytes` what a tenant may pin, None where nobody has said it."""
        self._budget = budget
        self._pinned_bytes = pinned_bytes

    def check(self, pin: Pin, others: Iterable[Pin]) -> None:
        """Raise QuotaExceededError unless the owner of `pin` may have it beside all `others`.

        Of whom nothing is said may pin as long as all tenants together leave half of the memory: so whatever needs no
        more than that always comes in.
        """
        tenant, pins = tenant_of(pin.name), (pin, *others)
        most = self._pinned_bytes(tenant or DEFAULT_TENANT)
        if most is not None:
            own = [one for one in pins if tenant_of(one.name) == tenant]
            self._check(own, most, "this tenant may have pinned")
        elif tenant:
            of_tenants = [one for one in pins if tenant_of(one.name)]
            self._check(of_tenants, self._budget // SHARE_OF_TENANTS, "tenants may have pinned together")

    def _check(self, pins: Iterable[Pin], most: int, who_may: str) -> None:
        total = sum({pin.digest: pin.nbytes for pin in pins}.values())
        if total > most:
            raise QuotaExceededError(f"{who_may} {most} bytes, and this would make it {total}: unpin one")
