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

    def check(self, pin: Pin, others: Iterable[Pin], now: Pin | None) -> None:
        """Raise QuotaExceededError unless the owner of `pin` may have it beside all `others`, in the place of `now`.

        Of whom nothing is said may pin as long as all tenants together leave half of the memory: so whatever needs no
        more than that always comes in. What makes nothing larger may be, however much there is already.
        """
        tenant, others = tenant_of(pin.name), list(others)
        most = self._pinned_bytes(tenant or DEFAULT_TENANT)
        if most is not None:
            own = [one for one in others if tenant_of(one.name) == tenant]
            if _is_too_much(pin, own, now, most):
                raise QuotaExceededError(f"this tenant may have pinned {most} bytes, and this would be more: unpin one")
        elif tenant:
            of_tenants, most = [one for one in others if tenant_of(one.name)], self._budget // SHARE_OF_TENANTS
            if _is_too_much(pin, of_tenants, now, most):
                raise QuotaExceededError(
                    f"tenants may have pinned together {most} bytes, and this would be more: "
                    "unpin one, or have the operator set pinned_bytes for this tenant"
                )


def _is_too_much(pin: Pin, others: list[Pin], now: Pin | None, most: int) -> bool:
    before = _total([*others, now] if now else others)
    return _total([*others, pin]) > max(most, before)


def _total(pins: Iterable[Pin]) -> int:
    """Of one digest once, whoever has it."""
    return sum({pin.digest: pin.nbytes for pin in pins}.values())
