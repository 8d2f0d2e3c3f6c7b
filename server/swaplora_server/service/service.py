"""The server's parts, put together: the base, the engine on it, and the registry of its adapters."""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any, TypeVar

import structlog

from swaplora_adapters.errors import AdapterError, StoreChangedError
from swaplora_adapters.priority import lower_priority
from swaplora_adapters.registry.index import parse_reference
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.sources.source import Sources
from swaplora_adapters.store.records import VersionRecord
from swaplora_server.access.audit import AuditLog
from swaplora_server.access.key_ring import KeyRing
from swaplora_server.access.limits import OwnMeter, Reservation
from swaplora_server.base.base_model import BaseModel
from swaplora_server.base.decode_graphs import RecordedSteps
from swaplora_server.base.encoder.encoder_base import EncoderBase
from swaplora_server.base.fingerprint import digest_of, programs
from swaplora_server.base.loading import load_chosen_base
from swaplora_server.config import Settings
from swaplora_server.engine.engine import Engine
from swaplora_server.service.adapters.derivations import Derivations
from swaplora_server.service.adapters.host_tier import host_budget
from swaplora_server.service.adapters.ingest import Ingest, TenantIngest
from swaplora_server.service.adapters.registry import open_registry, put_folders, report_ingest
from swaplora_server.service.admission import Admissions
from swaplora_server.service.changers import Changers
from swaplora_server.service.chat_template import ChatTemplate
from swaplora_server.service.errors import RequestError
from swaplora_server.service.evaluations.evaluations import Evaluations
from swaplora_server.service.gates.canaries import Canaries
from swaplora_server.service.gates.gates import Gates
from swaplora_server.service.gates.task_files import TaskFiles
from swaplora_server.service.generating.decoder_engine import DecoderPlan
from swaplora_server.service.grammar.grammars import Grammars
from swaplora_server.service.grammar.vocabulary import grammar_tokenizer
from swaplora_server.service.metrics.metrics import Metrics
from swaplora_server.service.metrics.records import ServerState
from swaplora_server.service.mixtures.routers import Routers
from swaplora_server.service.offload import GilTurns, Offload
from swaplora_server.service.pooling.encoder_engine import check_settings, encoder_engine, max_input_len
from swaplora_server.service.prompts import LONG_CHARACTERS, PromptTokenizer
from swaplora_server.service.tools.dialect import Dialect, dialect_of
from swaplora_server.service.tools.tool import Tool
from swaplora_server.service.tracing.tracing import Tracing
from swaplora_server.service.wakeups import Wakeups, result_of

_JOIN_SECONDS = 3.0
NUM_UPLOAD_THREADS = 4  # each writes what has come of one upload; as many others take whole ones in
NUM_CHANGE_THREADS = 4  # changes are made one at a time, and may wait for the shared store
# settings that decide what lies in a step together, and with what it is computed
ANSWERS_DEPEND_ON = (
    "quantization",
    "cuda_graphs",
    "max_num_seqs",
    "max_batch_tokens",
    "max_step_ranks",
    "block_size",
    "prefix_cache",
)
SEEN_SECONDS = (
    0.25  # that a request waits for a shared store that does not answer, before it goes on with what is known
)
BUSY_SECONDS = 2.0  # and for one that does
_MESSAGE_CHARACTERS = 64  # a message costs a template about as much as so many characters more
_log = structlog.get_logger(__name__)
Result = TypeVar("Result")


class Service:
    """What the routes work with. Everything but the settings is there once `start` has returned."""

    base: BaseModel
    engine: Engine
    derivations: Derivations
    evaluations: Evaluations
    canaries: Canaries
    gates: Gates
    tokenizer: PromptTokenizer
    grammars: Grammars
    routers: Routers
    max_model_len: int
    kv_cache_bytes: int
    fingerprint: str  # of all that answers depend on, requests and adapters aside

    def __init__(self, settings: Settings) -> None:
        """Raises KeyFileError for a file of keys that cannot be used, AuditLogError and TracingError."""
        self.settings = settings
        keys = [key.get_secret_value() for key in settings.api_key]
        self.keys = KeyRing(keys, settings.key_file, _log.error)
        self.meter = OwnMeter()
        self.audit = AuditLog(settings.audit_log, _log.error)
        self.tracing = Tracing(is_on=settings.tracing)
        self.started_at = int(time.time())
        self.is_draining = False
        self.metrics = Metrics(self._state, settings.base_id, self._is_adapter)
        self.admissions = Admissions(settings.max_waiting, settings.max_num_seqs, settings.max_wait_seconds)
        # the loop's own threads are for what is short: lists, metrics
        self.offload = Offload(settings.tokenizer_threads, settings.max_waiting, "tokenize")
        self.gil_turns = GilTurns()
        self.upload_threads = ThreadPoolExecutor(NUM_UPLOAD_THREADS, "upload", initializer=lower_priority)
        self._takers_in = Changers(NUM_UPLOAD_THREADS, "take-in", lower_priority)
        self._changers = Changers(NUM_CHANGE_THREADS, "change")
        self._recorded: RecordedSteps | None = None
        self._is_ready = threading.Event()
        self._lock = threading.Lock()
        self._opened = ExitStack()  # what is to be ended and closed, from the last to the first

    @property
    def registry(self) -> Registry:
        """All that there is."""
        return self._registry

    @property
    def ingest(self) -> Ingest | TenantIngest:
        """What comes without an upload."""
        return self._ingest

    @property
    def tenant(self) -> str:
        """Whose requests these are; "" for the default one."""
        return ""

    @property
    def peer(self) -> str:
        """The address that they come from, where no key tells whose they are."""
        return ""

    @property
    def is_key_good(self) -> bool:
        """Whether the caller's key, with which something longer was begun, still lets it generate."""
        return True

    def check_room(self) -> None:
        """Raise RequestError where no request of the caller's tenant would be let in, whatever it asks for."""
        self.admissions.check_room(self.tenant, self.peer)

    async def reserve_tokens(self, num_tokens: int, param: str) -> Reservation:
        """Take what a request may come to from what its key and its tenant may have; `param` says how much that is.

        Raises RequestError.
        """
        return Reservation(num_tokens)

    def stored_name(self, name: str) -> str:
        """What an adapter is called where there are those of all tenants: in the metrics."""
        return name

    @property
    def is_ready(self) -> bool:
        if not self._is_ready.is_set() or self.is_draining or not self.engine.is_alive:
            return False
        return not self._registry.names.changes.is_stuck  # others have the room on their disk that this one lacks

    @property
    def is_healthy(self) -> bool:
        """Starting, or with an engine that has neither failed nor hangs."""
        return not self._is_ready.is_set() or self.engine.is_alive

    @property
    def has_ended(self) -> bool:
        """After `stop`: whether nothing is left that would have to be waited for."""
        if not self._is_ready.is_set():
            return True
        is_changing = self._takers_in.num_running or self._changers.num_running
        return self.engine.has_ended and not (is_changing or self._registry.waits_for_store)

    @cached_property
    def wakeups(self) -> Wakeups:
        """What the engine tells the event loop through; first asked for on that loop, the one that serves."""
        return Wakeups()

    def start(self, report: Callable[[str], None]) -> None:
        """Load the base, open the registry, and start the engine. `report` hears what is being done.

        Raises UnsupportedModelError, EmbeddedBaseError, AdapterError and OSError, each with a message for the operator.
        Nothing stays open then.
        """
        settings = self.settings
        self.base = load_chosen_base(settings, report)
        self.engine = self._make_engine()  # before adapters, which take of the GPU what is measured here
        report("reading adapters")
        with ExitStack() as opened:
            opened.callback(self.tracing.stop)
            self.keys.start()
            opened.callback(self.keys.stop)
            self._sources = Sources(
                allowed=settings.allow_source, folder=settings.adapter_dir, max_weights_bytes=settings.max_adapter_bytes
            )
            self._registry = open_registry(
                settings,
                self.base,
                self._sources,
                self.metrics.adapters,
                pinned_bytes=lambda tenant: self.keys.tenant_limits(tenant).pinned_bytes,
            )
            opened.callback(self._registry.close)
            opened.callback(self._takers_in.join, _JOIN_SECONDS)
            opened.callback(self._changers.join, _JOIN_SECONDS)
            self.evaluations = Evaluations(settings.data_dir / "evaluations")
            kept = settings.data_dir / "canaries.json"
            self.canaries = Canaries(self._registry, self.audit, self.metrics.count_step_back, kept)
            opened.callback(self.canaries.close)
            self.gates = Gates(TaskFiles(settings.data_dir / "gates", self._registry.extras), self._registry)
            put_folders(self._registry, settings.adapter_folders)
            self._ingest = Ingest(self.registry, settings.adapter_dir, settings.resolver, report_ingest)
            opened.callback(self._ingest.join)
            opened.callback(self._ingest.stop)
            self._ingest.start(settings.adapter_rescan_seconds)
            self.derivations = Derivations(settings, self.base.layers.linears)
            opened.callback(self.derivations.stop)
            for name in self.registry.pins_not_kept():
                _log.warning("not all pinned adapters fit in memory: this one may leave it", adapter=name)
            self.routers = Routers(self.base.paths, self.offload)
            self.tokenizer = PromptTokenizer(self.base.tokenizer, self.max_model_len, self.offload)
            if self.generates:
                self.grammars = self._make_grammars()
                opened.callback(self.grammars.close, _JOIN_SECONDS)
            self.fingerprint = self._fingerprint()
            self.engine.start()
            opened.callback(self.offload.join, _JOIN_SECONDS)
            opened.callback(self.engine.stop, _JOIN_SECONDS)
            self._opened = opened.pop_all()
        self._is_ready.set()

    def stop(self) -> None:
        """End the engine and close the registry, if they came to be; whoever asks a second time waits for the first.

        All who wait for anything are told so first.
        """
        self.is_draining = True
        with self._lock:
            if self._is_ready.is_set():
                self._sources.stop()
                self._ingest.stop()
                self._registry.stop()
                self._opened.close()

    async def change(self, job: Callable[[], Result]) -> Result:
        """What `job` returns or raises, which changes names, and may wait for the shared store; see `Changers.do`."""
        return await self._changers.do(self._registry.names.changes, job)

    async def take_in(self, job: Callable[[], Result]) -> Result:
        """The same for one that checks an upload and sends its files, beside which names can be changed."""
        return await self._takers_in.do(self._registry.names.changes, job)

    async def see_others_changes(self) -> bool:
        """Wait until all is known that any server has acknowledged by now, a moment at most; whether it is.

        Longer as long as the store answers: then it is this server that is slow.
        """
        if self.settings.shared_store is None or not self._is_ready.is_set():
            return True
        began, seen, changes = time.monotonic(), self._registry.seen(), self._registry.names.changes
        while True:
            try:
                async with asyncio.timeout(SEEN_SECONDS):
                    await result_of(seen)
                return True
            except AdapterError:
                break
            except TimeoutError:
                if changes.heard_at < began or time.monotonic() - began > BUSY_SECONDS:
                    break
        self.metrics.count_unseen()
        return False

    def check_serving(self) -> None:
        """Raise RequestError unless a new request can be taken."""
        if self.is_draining:
            raise RequestError("draining", "the server is shutting down and takes no new requests")
        if not self._is_ready.is_set():
            raise RequestError("not_ready", "the server is still starting; GET /health/ready says when it has")
        if not self.engine.is_alive:
            raise RequestError("engine_failed", self.engine.failure or "the engine has stopped")
        if isinstance(failure := self._registry.names.changes.failure, StoreChangedError):
            raise RequestError(failure.code, str(failure))

    def is_base(self, model: str) -> bool:
        return model == self.settings.base_id

    def reference(self, model: str) -> str:
        """`model` as the registry knows it: clients of SGLang and Ray write the base's id and a colon before a name."""
        prefix = f"{self.settings.base_id}:"
        return f"base:{model.removeprefix(prefix)}" if model.startswith(prefix) else model

    @cached_property
    def chat_template(self) -> ChatTemplate:
        return ChatTemplate(self.base.tokenizer, self.dialect.calls)

    @cached_property
    def dialect(self) -> Dialect:
        """How the base writes calls and reasoning."""
        settings, base = self.settings, self.base
        return dialect_of(base.tokenizer, base.vocabulary, settings.tool_call_format, settings.reasoning_format)

    async def when_long(self, size: int, job: Callable[[], Result]) -> Result:
        """What `job` returns or raises, off the event loop if it is long, of about `size` characters' cost."""
        return job() if size <= LONG_CHARACTERS else await self.offload.do(size, job)

    async def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any],
        param: Callable[[int], str],
        *,
        add_special_tokens: bool,
        tools: Sequence[Tool] = (),
        **options: bool,
    ) -> list[list[int]]:
        """A conversation as the one prompt of its request; see `ChatTemplate.render`."""
        told = [tool.definition for tool in tools]
        render = partial(self.chat_template.render, messages, template_kwargs, told, **options)
        size = sum(_MESSAGE_CHARACTERS + len(message["content"]) for message in messages)
        size += sum(tool.num_characters for tool in tools)
        text = await self.when_long(size, render)
        return await self.tokenizer.encode_all([text], param, add_special_tokens=add_special_tokens)

    async def warm(self, reference: str) -> VersionRecord:
        """Load the version that `reference` names into memory, and wait until it is there. Raises AdapterError.

        An alias is unknown here: one that splits names no version.
        """
        self.registry.names.index.resolve_name(reference)
        request_leases = self.registry.lease_weights([self.registry.lease(reference)])
        try:
            await result_of(request_leases.weights)
        finally:
            request_leases.release()
        return request_leases.leases[0].record

    def memory_plan(self) -> list[tuple[str, int]]:
        """What the server's memory is for, in bytes."""
        recorded = self._recorded
        host_bytes = host_budget(self.settings.host_adapter_bytes, self.base.device.type)
        return [
            ("base weights", self.base.weight_bytes),
            *([("KV cache, at most", self.kv_cache_bytes)] if self.generates else []),
            ("adapters, at most", self.settings.adapter_memory_bytes),
            *([(f"{recorded.num_graphs} recorded steps", recorded.num_bytes)] if recorded else []),
            *([("adapters in the host's memory, at most", host_bytes)] if host_bytes else []),
        ]

    def computes_with(self) -> dict[str, str | None]:
        """The device, the number format and the kernels of the steps; None of them while there is no engine yet."""
        if not self._is_ready.is_set():
            return dict.fromkeys(("device", "dtype", "kernels"))
        base = self.base
        dtype = str(base.dtype).removeprefix("torch.")
        return {"device": base.device.type, "dtype": dtype, "kernels": base.backend.description}

    def _fingerprint(self) -> str:
        """Another one wherever the same request may be answered otherwise: for where a step ends decides roundings."""
        base, settings = self.base, self.settings
        chosen = {name: getattr(settings, name) for name in ANSWERS_DEPEND_ON}
        computes = [str(base.device), str(base.dtype), base.backend.description, self.max_model_len]
        return digest_of([base.fingerprint, programs(), chosen, computes])

    def _state(self) -> ServerState | None:
        """The engine and the adapters as they are now; None before there is an engine."""
        if not self._is_ready.is_set():
            return None
        registry = self._registry
        aliases = registry.names.index.aliases()
        return ServerState(
            self.engine.snapshot(),
            registry.resident_bytes,
            registry.memory_budget,
            registry.host_bytes,
            registry.states(),
            [(alias.alias, [parse_reference(target.reference).name for target in alias.targets]) for alias in aliases],
            self.admissions.num_held(),
            registry.revision,
        )

    def _is_adapter(self, name: str) -> bool:
        """While the registry opens only it speaks of names, and knows them."""
        return "_registry" not in vars(self) or name in self._registry.names.index

    def _make_engine(self) -> Engine:
        settings, base = self.settings, self.base
        if isinstance(base, EncoderBase):
            check_settings(settings)
            self.kv_cache_bytes, self.max_model_len = 0, max_input_len(base, settings)
            return encoder_engine(base, settings, self.max_rows, self.max_model_len)
        made = DecoderPlan(base, settings, self.max_rows).make()
        self.kv_cache_bytes, self.max_model_len, self._recorded = made.kv_cache_bytes, made.max_model_len, made.recorded
        return made.engine

    @property
    def generates(self) -> bool:
        """Whether the base goes on with what it reads."""
        return not isinstance(self.base, EncoderBase)

    def check_generating(self) -> None:
        """Raise RequestError where the base generates nothing."""
        if not self.generates:
            message = f"{self.settings.base_id} is an encoder, which generates nothing: ask it for embeddings"
            raise RequestError("invalid_request", message, "model")

    @property
    def max_rows(self) -> int:
        """Of sequences that run at once."""
        return min(self.settings.max_num_seqs, self.settings.max_batch_tokens)

    def _make_grammars(self) -> Grammars:
        base = self.base
        backend = base.tokenizer.backend_tokenizer
        tokenizer = grammar_tokenizer(backend, base.vocabulary, base.vocab_size, base.eos_token_ids)
        return Grammars(tokenizer, self.settings.max_waiting, self.gil_turns)
