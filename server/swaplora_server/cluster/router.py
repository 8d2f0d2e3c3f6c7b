"""Ray Serve's way of asking `affinity.py`: a request router, for `RequestRouterConfig` of the replicas' deployment.

Ray says of this interface that it may change: read in 2.60. Each process that calls the replicas has a router, which
belongs to that process's event loop.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from random import Random
from typing import Any

import structlog
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from swaplora_server.cluster.affinity import Affinity, ReplicaState, RouteKey

_FIRST = 2  # that are tried one by one, before Ray chooses the least busy of all others
_log = structlog.get_logger(__name__)


class AdapterAffinityRouter(RequestRouter):  # type: ignore[misc]  # Ray is not there where this is checked
    """The first argument of a call is its RouteKey; other calls go anywhere.

    Not with Ray's FIFOMixin: that gives a replica which was chosen for one request to whichever waits longest.
    """

    def initialize_state(self) -> None:
        """It has no settings."""
        self._random = Random()
        self._affinity = Affinity(self._random)
        self._has_failed = False
        self._stats: dict[ReplicaID, Mapping[str, Any]] = {}
        self._routed: Counter[tuple[ReplicaID, str]] = Counter()  # by replica and Ray's internal id: what it has

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """What Ray calls when replicas come, go, or have told something new."""
        self._affinity.set_replicas([replica.replica_id.unique_id for replica in replicas])
        before, self._stats = self._stats, {replica.replica_id: replica.routing_stats for replica in replicas}
        for replica in replicas:
            stats = replica.routing_stats
            if stats and stats != before.get(replica.replica_id):
                self._affinity.told(replica.replica_id.unique_id, _state_of(stats), time.monotonic())
        super().update_replicas(replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of them, the best first."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # or Ray asks again without a pause if all are full
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        try:
            names = self._affinity.rank(_key_of(pending_request), time.monotonic())
        except Exception:  # noqa: BLE001 - Ray drops the requests for which this raises
            self._fails()
            names = self._random.sample(list(by_name), len(by_name))
        ranked = [by_name[name] for name in names if name in by_name]
        return [*([replica] for replica in ranked[:_FIRST]), ranked[_FIRST:]]

    def _fulfill_next_pending_request(self, replica: RunningReplica, request_metadata: Any = None) -> None:
        """Give the replica to the request that it was chosen for, and count it, before the next one is looked at.

        Ray finds that by its internal id, which all calls of one HTTP request share; its metadata it has alone.
        """
        for pending in self._pending_requests_to_fulfill:
            if pending.metadata is request_metadata and not pending.future.done():
                name, key = replica.replica_id.unique_id, _key_of(pending)
                try:
                    self._affinity.routed(key, name, time.monotonic())
                except Exception:  # noqa: BLE001 - as above
                    self._fails()
                key.tried.append(name)
                self._routed[replica.replica_id, pending.metadata.internal_request_id] += 1
                self._record_queue_wait_time(pending)
                pending.future.set_result(replica)
                self._remove_pending_request_from_indices(pending)
                return

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """As Ray does; but whoever leaves between the choice and the sending is no load any more."""
        try:
            return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        except asyncio.CancelledError:
            future = pending_request.future
            if future.done() and not future.cancelled() and future.exception() is None:
                self.on_request_completed(future.result().replica_id, pending_request.metadata.internal_request_id)
            raise

    def _fails(self) -> None:
        """Say so, once: it would be said of each request."""
        if not self._has_failed:
            self._has_failed = True
            _log.exception("requests are routed at random: who is to have them cannot be told")

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """What Ray calls once for each request that it sent, also when the replica refused it or died.

        And for what it sends to all of them, which nobody routed and which is no load.
        """
        routed = replica_id, internal_request_id
        if routed in self._routed:
            self._routed[routed] -= 1
            if not self._routed[routed]:
                del self._routed[routed]
            self._affinity.completed(replica_id.unique_id)


def _key_of(pending: PendingRequest | None) -> RouteKey:
    first = pending.args[0] if pending is not None and pending.args else None
    return first if isinstance(first, RouteKey) else RouteKey()


def _state_of(stats: Mapping[str, Any]) -> ReplicaState:
    """Of what `record_routing_stats` gives."""
    return ReplicaState(
        frozenset(stats["resident"]), stats["queue"] + stats["running"], stats["capacity"], stats.get("is_ready", True)
    )
