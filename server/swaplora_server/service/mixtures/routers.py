"""Who may be in a mixture, and how it chooses: made of the weights of its members, whichever versions these are."""

import asyncio
from collections.abc import Sequence
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np

from swaplora_adapters.store.records import Mixing
from swaplora_adapters.weights.router import Prototypes, Router, Trace
from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.service.offload import Offload


class MemberError(ValueError):
    """The member of this number cannot be in the mixture."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Routers:
    """Makes them. An adapter's prototypes are kept as long as its weights are in memory. Belongs to the event loop."""

    def __init__(self, paths: Sequence[str], offload: Offload) -> None:
        """`paths` are those of all modules by number."""
        self._paths = paths
        self._offload = offload
        self._prototypes: WeakKeyDictionary[AdapterWeights, asyncio.Future[Prototypes]] = WeakKeyDictionary()

    async def router(self, weights: Sequence[AdapterWeights], mixing: Mixing, trace: Trace | None = None) -> Router:
        """Raises MemberError, and RequestError where more waits than is good.

        PEFT wants equal ranks as well; here they may differ, which comes to the same as zeros in place of what is
        missing.
        """
        members = [await self._of(number, each) for number, each in enumerate(weights)]
        for number, member in enumerate(members):
            odd = np.flatnonzero((member.addresses == 0) != (members[0].addresses == 0))
            if len(odd):
                where = self._paths[odd[0]]
                raise MemberError(number, f"adds to other modules than the first member does, such as {where}")
        if trace is not None:
            trace.begin(mixing.top_k)
        return Router(tuple(members), mixing.top_k, mixing.temperature, trace)

    async def _of(self, number: int, weights: AdapterWeights) -> Prototypes:
        """Those whose prototypes were made are known to be good; who asks while they are made waits for the same."""
        found = self._prototypes.get(weights)
        if found is None:
            check_member(number, weights)
            made = self._offload.do(weights.num_parameters, partial(Prototypes, weights, self._paths))
            found = self._prototypes[weights] = asyncio.ensure_future(made)
            found.add_done_callback(partial(self._forget_failed, weights))
        return await asyncio.shield(found)  # whoever leaves does not end it for the others

    def _forget_failed(self, weights: AdapterWeights, made: asyncio.Future[Prototypes]) -> None:
        if made.cancelled() or made.exception() is not None:
            self._prototypes.pop(weights, None)


def check_member(number: int, weights: AdapterWeights) -> None:
    """Raise MemberError for one that adds otherwise than by plain factors."""
    has_bias = any(module.shift is not None for module in weights.modules.values())
    if has_bias or not weights.is_sum or weights.embeddings:
        message = (
            "does more than add the product of two factors to linears (DoRA, biases, embeddings, "
            "modules of its own, a head, an invocation)"
        )
        raise MemberError(number, message)
