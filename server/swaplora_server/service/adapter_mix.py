"""Who answers a request: the base alone, one adapter, a sum of several or a mixture; each is leased while it runs."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from swaplora_adapters.errors import (
    AdapterError,
    AdapterFailedError,
    AdapterNotFoundError,
    AdapterTooLargeError,
    AliasNotFoundError,
    MemoryFullError,
    VersionNotFoundError,
)
from swaplora_adapters.registry.leases import Lease, RequestLeases
from swaplora_adapters.store.records import Mixing, VersionRecord
from swaplora_adapters.weights.router import Route, Router, Trace
from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.engine.request import LAST_PRIORITY, AdapterUse
from swaplora_server.log_lines import notes
from swaplora_server.service.admission import Admission, Urgency
from swaplora_server.service.errors import RequestError
from swaplora_server.service.gates.canaries import Trial
from swaplora_server.service.mixtures.routers import MemberError
from swaplora_server.service.service import Service
from swaplora_server.service.wakeups import result_of


class MixTerm(NamedTuple):
    """An adapter, by any name that leads to it, how much of it, and the field of the request that names it."""

    name: str
    scale: float = 1.0
    param: str = "model"


class Asker(NamedTuple):
    """Whoever wants an answer. `client` keeps to one side of an alias that splits; peers take turns in a search."""

    client: str | None = None
    peer: str = ""


NOBODY = Asker()
SUMS, UNKNOWN = "+", "?"  # which are nobody's names


class BoundMixture(NamedTuple):
    """What a mixture's name stood for when somebody looked: its members, and how each token chooses among them."""

    members: Sequence[str]
    mixing: Mixing


@dataclass(frozen=True, slots=True)
class AdapterMix:
    """The adapters whose deltas are added to the base, each times its scale. None of them: the base.

    With a `router` they are a mixture's members.
    """

    request_leases: RequestLeases
    scales: tuple[float, ...]
    params: tuple[str, ...]  # the request's fields that name them
    router: Callable[[Sequence[AdapterWeights]], Awaitable[Router]] | None = None
    trial: Trial | None = None  # of an alias's canary, which is to hear how it ended

    def tell(self, error: str | None) -> None:
        """A canary answered, or ended with an error of this code."""
        if self.trial is not None:
            self.trial(error)

    @property
    def leases(self) -> tuple[Lease, ...]:
        return self.request_leases.leases

    @property
    def records(self) -> tuple[VersionRecord, ...]:
        """Which versions answer; of a sum all, in order."""
        return tuple(lease.record for lease in self.leases)

    async def uses(self) -> tuple[AdapterUse, ...]:
        """Wait for the weights. Raises RequestError for those that cannot be had, and for what does not add up.

        Raises StorageFailedError as well.
        """
        try:
            weights = await result_of(self.request_leases.weights)
        except (AdapterFailedError, AdapterTooLargeError, MemoryFullError) as error:
            self.tell(error.code)
            raise RequestError(error.code, self._told(error), self._param_at_fault()) from error
        digests = [record.digest for record in self.records]
        uses = tuple(
            AdapterUse(weights[digest], scale, digest) for digest, scale in zip(digests, self.scales, strict=True)
        )
        if self.router is not None:
            return await self._routed(self.router, uses)
        if self.scales not in ((), (1.0,)):
            self._check_sum(uses)
        return uses

    async def _routed(
        self, make: Callable[[Sequence[AdapterWeights]], Awaitable[Router]], uses: Sequence[AdapterUse]
    ) -> tuple[AdapterUse, ...]:
        try:
            router = await make([use.weights for use in uses])
        except MemberError as error:
            record = self.records[error.number]
            message = f"{record.name}@{record.version} cannot be in a mixture: {error}"
            raise RequestError("invalid_request", message, self.params[error.number]) from error
        return tuple(replace(use, route=Route(router, number)) for number, use in enumerate(uses))

    def _told(self, error: AdapterError) -> str:
        """With the version that is at fault, if it is one: of a split, a mixture or a sum nobody knows it otherwise."""
        at_fault = self.request_leases.at_fault
        return str(error) if at_fault is None else f"{at_fault.record.name}@{at_fault.record.version}: {error}"

    def _param_at_fault(self) -> str:
        """The field of the one that cannot be had, or of all of them."""
        if self.request_leases.at_fault is not None:
            return self.params[self.leases.index(self.request_leases.at_fault)]
        return self.params[0] if len(set(self.params)) == 1 else "adapters"

    def _check_sum(self, uses: Sequence[AdapterUse]) -> None:
        for param, use, record in zip(self.params, uses, self.records, strict=True):
            if not use.weights.is_sum:
                message = (
                    f"{record.name!r} does more than add to the base (DoRA, modules of its own, an invocation), "
                    "so it has no place in a sum: name it alone, at scale 1"
                )
                raise RequestError("invalid_request", message, param)


async def lease_mix(
    service: Service,
    model: str,
    terms: Sequence[MixTerm],
    asker: Asker,
    admission: Admission,
    trace: Trace | None = None,
    mixture: BoundMixture | None = None,
) -> AdapterMix:
    """Lease all that a request names, and claim memory for it: `admission` holds them.

    `trace` is shown what its tokens take, if it is for a mixture. `mixture` is what `model` stands for, where that was
    looked up before. Raises RequestError, and AdapterError for an adapter that cannot be had.
    """
    name = service.reference(model).removeprefix("base:")
    mixture = mixture or bound_mixture(service, name)
    if mixture is None:
        return await _lease_all(service, _named(service, model, terms), asker, admission)
    _check_base(service, model, terms)
    try:
        return await lease_members(service, *mixture, admission, "model", asker, trace)
    except RequestError as error:  # another tenant's, which is shared no more
        if error.code != "model_not_found":
            raise
        raise RequestError(error.code, f"the mixture {name!r} has lost a member: {error}", error.param) from error


async def awaited_uses(service: Service, mix: AdapterMix, urgency: Urgency) -> tuple[AdapterUse, ...]:
    """`mix.uses()`. While it lacks room, those of the last priority, which may have it, are done as soon as may be."""
    if urgency.priority == LAST_PRIORITY:
        return await mix.uses()
    with service.engine.hurrying_last(mix.request_leases.lacks_room):
        return await mix.uses()


def bound_mixture(service: Service, name: str) -> BoundMixture | None:
    """What the name of a mixture stands for now; None for any other."""
    index = service.registry.names.index
    if not index.is_mixture(name):
        return None
    found = index.mixture(name)
    assert found.mixing is not None
    return BoundMixture([target.reference for target in found.targets], found.mixing)


async def lease_members(
    service: Service,
    members: Sequence[str],
    mixing: Mixing,
    admission: Admission,
    param: str,
    asker: Asker = NOBODY,
    trace: Trace | None = None,
) -> AdapterMix:
    """The same for the members of a mixture; `param` is the field of the request that names it, or them."""
    terms = [MixTerm(member, param=param) for member in members]
    mix = await _lease_all(service, terms, asker, admission, are_routed=True)
    return replace(mix, router=partial(service.routers.router, mixing=mixing, trace=trace))


async def _lease_all(
    service: Service, terms: Sequence[MixTerm], asker: Asker, admission: Admission, *, are_routed: bool = False
) -> AdapterMix:
    for term in terms:
        admission.hold(await _lease(service, term, asker))
    scales, params = tuple(term.scale for term in terms), tuple(term.param for term in terms)
    mix = AdapterMix(admission.claim_memory(service.registry, are_routed=are_routed), scales, params)
    _note(mix.records)
    return mix if len(terms) != 1 else replace(mix, trial=_trial(service, terms[0].name, mix.records[0]))


def _trial(service: Service, name: str, record: VersionRecord) -> Trial | None:
    alias = service.reference(name).removeprefix("base:")
    if not service.registry.names.index.is_alias(alias):
        return None
    return service.canaries.trial(service.stored_name(alias), service.stored_name(record.name), record)


def wanted_by(service: Service, model: str, terms: Sequence[MixTerm]) -> str:
    """What a request is for, whichever version of it: the base, an adapter, a mixture, or any sum.

    An alias is for what it leads to. All sums are one, as are all names that stand for nothing here: a client could
    make any number of them up.
    """
    names = {_leads_to(service, term.name) for term in terms} or {_leads_to(service, model)}
    return names.pop() if len(names) == 1 else SUMS


def _leads_to(service: Service, model: str) -> str:
    """Without its version; of an alias that splits, where most of it leads."""
    name, index = service.reference(model).removeprefix("base:"), service.registry.names.index
    if service.is_base(model) or index.is_mixture(name):
        return name
    with suppress(AdapterNotFoundError, AliasNotFoundError):
        if index.is_alias(name):
            reference = max(index.alias(name).targets, key=lambda target: target.weight).reference
        else:
            reference = name
        return index.resolve_name(reference.partition("@")[0]).name
    return UNKNOWN


def invoked_at(prompt: Sequence[int], uses: Sequence[AdapterUse], param: str = "prompt") -> int:
    """The first token that an activated adapter (aLoRA, arXiv 2504.12397) applies to: where its invocation stands last.

    0 for other kinds. Raises RequestError, with `param` for the prompt, for one without the invocation, which the base
    alone would answer.
    """
    for use in uses:
        if invocation := use.weights.invocation:
            return _last(prompt, invocation, param)
    return 0


def _note(records: Sequence[VersionRecord]) -> None:
    """For the log's line: who answers; of a sum all, in order, and nobody for the base."""
    if records:
        adapter, version = (", ".join(each) for each in zip(*((r.name, str(r.version)) for r in records), strict=True))
        notes().update(adapter=adapter, version=version)


def _named(service: Service, model: str, terms: Sequence[MixTerm]) -> Sequence[MixTerm]:
    _check_base(service, model, terms)
    for term in terms:
        if service.is_base(term.name):
            raise RequestError("invalid_request", "the base is in every sum already", term.param)
        if service.registry.names.index.is_mixture(service.reference(term.name).removeprefix("base:")):
            message = f"{term.name} is a mixture, which has no place in a sum: name it alone, as model"
            raise RequestError("invalid_request", message, term.param)
    return terms if service.is_base(model) else [MixTerm(model)]


def _check_base(service: Service, model: str, terms: Sequence[MixTerm]) -> None:
    if terms and not service.is_base(model):
        message = f"adapters are added to the base: with them, model is {service.settings.base_id}"
        raise RequestError("invalid_request", message, "model")


async def _lease(service: Service, term: MixTerm, asker: Asker) -> Lease:
    """A lease on who it stands for, looked for where the operator says if it is not here yet.

    Raises RequestError model_not_found, and VersionNotFoundError.
    """
    reference = service.reference(term.name)
    name = reference.removeprefix("base:")
    try:
        try:
            return service.registry.lease(reference, asker.client)
        except AdapterNotFoundError:
            if not await service.ingest.resolve(reference, asker.peer):
                raise
            return service.registry.lease(reference, asker.client)
    except VersionNotFoundError:
        _note_if_lost(service, name)
        raise
    except AdapterNotFoundError as error:
        _note_if_lost(service, name)
        is_known = service.registry.names.index.is_alias(name)
        leads = f"the alias {name!r} leads nowhere: {error}" if is_known else f"there is no model {term.name[:128]!r}"
        message = f"{leads}; GET /v1/models lists what there is"
        raise RequestError("model_not_found", message, term.param) from error


def _note_if_lost(service: Service, alias: str) -> None:
    """A canary that another tenant has deleted or shares no more has failed."""
    index = service.registry.names.index
    canary = index.alias(alias).canary if index.is_alias(alias) else None
    if canary is None:
        return
    try:
        index.resolve_name(canary.target)
    except (AdapterNotFoundError, VersionNotFoundError):
        service.canaries.miss(service.stored_name(alias))


def _last(prompt: Sequence[int], invocation: Sequence[int], param: str) -> int:
    for start in range(len(prompt) - len(invocation), -1, -1):
        if tuple(prompt[start : start + len(invocation)]) == tuple(invocation):
            return start
    message = f"the prompt lacks the tokens {list(invocation)} that invoke the adapter; without them it does not apply"
    raise RequestError("invalid_request", message, param)
