"""Who may be in a mixture, and how it chooses: made of the weights of its members, whichever versions these are."""

from collections.abc import Sequence
from functools import partial
from weakref import WeakKeyDictionary

from swaplora_adapters.store.records import Mixing
from swaplora_adapters.weights.router import Prototypes, Router, Trace
from swaplora_adapters.weights.served import AdapterWeights, LinearWeights
from swaplora_server.kernels.backend import Backend
from swaplora_server.service.offload import Offload


class MemberError(ValueError):
    """The member of this number cannot be in the mixture."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Routers:
    """Makes them. An adapter's prototypes are kept as long as its weights are in memory. Belongs to the event loop."""

    def __init__(self, backend: Backend, paths: Sequence[str], offload: Offload) -> None:
        """`paths` are those of all modules by number."""
        self._backend = backend
        self._paths = paths
        self._offload = offload
        self._prototypes: WeakKeyDictionary[AdapterWeights, Prototypes] = WeakKeyDictionary()

    async def router(self, weights: Sequence[AdapterWeights], mixing: Mixing, trace: Trace | None = None) -> Router:
        """Raises MemberError, and RequestError where more waits than is good."""
        check_members(weights, self._backend)
        members = [await self._of(each) for each in weights]
        return Router(tuple(members), mixing.top_k, mixing.temperature, trace)

    async def _of(self, weights: AdapterWeights) -> Prototypes:
        found = self._prototypes.get(weights)
        if found is None:
            found = await self._offload.do(weights.num_parameters, partial(Prototypes, weights, self._paths))
            self._prototypes[weights] = found
        return found


def check_members(weights: Sequence[AdapterWeights], backend: Backend) -> None:
    """Raise MemberError for the first that adds otherwise than by plain factors, or elsewhere than the others.

    PEFT wants equal ranks as well; here they may differ, which comes to the same as zeros in place of what is missing.
    """
    if not backend.routes:
        raise MemberError(0, f"the server computes with {backend.description}, whose kernels know no mixtures yet")
    for number, each in enumerate(weights):
        if not each.is_sum or each.embeddings or any(map(_has_bias, each.modules.values())):
            message = (
                "does more than add the product of two factors to linears (DoRA, biases, embeddings, "
                "modules of its own, a head, an invocation)"
            )
            raise MemberError(number, message)
        odd = sorted(each.modules.keys() ^ weights[0].modules.keys())
        if odd:
            raise MemberError(number, f"adds to other modules than the first member does: one of them does at {odd[0]}")


def _has_bias(module: LinearWeights) -> bool:
    return module.shift is not None
