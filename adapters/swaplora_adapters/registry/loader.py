"""An adapter on its way into memory: fetched if its files are elsewhere, read and verified, prepared for its device."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from swaplora_adapters.fit.base import BaseLayers
from swaplora_adapters.priority import SHARE_OF_LOADS, lower_priority, pause
from swaplora_adapters.registry.residency.host_tier import HostTier
from swaplora_adapters.registry.usage import Stages, UsageByName
from swaplora_adapters.store.store import Store
from swaplora_adapters.weights.load import Fits, load_weights
from swaplora_adapters.weights.placement import Placement
from swaplora_adapters.weights.served import AdapterWeights


class AdapterLoader:
    """Brings digests into memory, for the residency: the times of each load are told to `usage`.

    `fetch` gets a digest's files from where other servers have put them; `prepare` makes of an adapter's weights what
    is served. `host` keeps them as they were before that.
    """

    def __init__(
        self,
        store: Store,
        fetch: Callable[[str], object],
        host: HostTier,
        usage: UsageByName,
        *,
        layers: BaseLayers,
        dtype: torch.dtype,
        placement: Placement | None,
        prepare: Callable[[AdapterWeights], AdapterWeights],
    ) -> None:
        self._store = store
        self._fetch = fetch
        self._host = host
        self._usage = usage
        self._layers = layers
        self._fits = Fits(layers)
        self._dtype = dtype
        self._placement = placement
        self._prepare = prepare
        self._fetched: dict[str, Stages] = {}
        self._verifier = ThreadPoolExecutor(1, "adapter-verify", initializer=lower_priority, initargs=(SHARE_OF_LOADS,))

    def to_bring(self, digest: str) -> Callable[[], None] | None:
        """What is to be done, and may take long, before a digest can be loaded; None where nothing is."""
        if digest in self._host or self._store.is_here(digest):
            return None

        def bring() -> None:
            stages = self._fetched[digest] = Stages()
            try:
                stages.time("fetch", lambda: self._fetch(digest))
            except BaseException as error:
                self._usage.load_failed(digest, error)
                raise

        return bring

    def load(self, digest: str) -> AdapterWeights:
        """The weights as they are served. Raises what reading and verifying do."""
        stages = self._fetched.pop(digest, None) or Stages()
        try:
            weights = self._host.find(digest) or self._read(digest, stages)
            pause()
            prepared = stages.time("prepare", lambda: self._prepare(weights))
        except BaseException as error:
            self._usage.load_failed(digest, error)
            raise
        self._usage.loaded(digest, stages.seconds)
        return prepared

    def close(self) -> None:
        self._verifier.shutdown()

    def _read(self, digest: str, stages: Stages) -> AdapterWeights:
        """The files are hashed again beside the load, and what was loaded counts only if they are what they were."""
        verified = self._verifier.submit(self._store.verify, digest)
        try:
            weights = stages.time("read", lambda: self._built(digest))
        finally:
            stages.time("verify", verified.result)
        return self._host.keep(weights)

    def _built(self, digest: str) -> AdapterWeights:
        paths = self._store.blob_paths(digest)
        host = torch.device("cpu")
        return load_weights(
            digest, paths.config, paths.weights, self._layers, self._dtype, host, self._placement, self._fits
        )
