"""Whom a request comes from, and what that key lets it do. Plain data."""

import enum
from collections.abc import Collection
from dataclasses import dataclass

from swaplora_adapters.files.naming import DEFAULT_TENANT
from swaplora_server.access.limits import NO_LIMITS, Limits, TenantLimits


class KeyScope(enum.StrEnum):
    """What a key may be for. ADMIN is for who runs the server, and stands for the others too."""

    GENERATE = "generate"
    READ = "adapters:read"
    WRITE = "adapters:write"
    METRICS = "metrics:read"  # of all tenants, for Prometheus
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """The key that a request came with, by its id, and whose it is."""

    key_id: str
    tenant: str
    scopes: frozenset[KeyScope]
    limits: Limits = NO_LIMITS
    tenant_limits: TenantLimits = NO_LIMITS  # of all keys of the tenant together

    @property
    def limited(self) -> dict[str, Limits]:
        """Whom a request is counted for, in the words that its sender reads."""
        return {f"key {self.key_id}": self.limits, f"tenant {self.tenant}": self.tenant_limits}

    def may(self, scopes: Collection[KeyScope]) -> bool:
        """Whether it has one of these."""
        return KeyScope.ADMIN in self.scopes or not self.scopes.isdisjoint(scopes)


ANYBODY = Caller("none", DEFAULT_TENANT, frozenset({KeyScope.ADMIN}))  # where no key is asked for
