"""The registry of adapters as the settings open it, and what the log has of adapters that cannot be taken in."""

from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from swaplora_adapters.errors import AdapterError
from swaplora_adapters.files.disk import StoreError
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.registry.usage import UsageListener
from swaplora_adapters.sources.source import Sources
from swaplora_adapters.sources.watcher import put_folder
from swaplora_adapters.store.shared.base import Base
from swaplora_adapters.store.shared.store import open_store
from swaplora_server.base.base_model import BaseModel
from swaplora_server.base.fingerprint import programs
from swaplora_server.config import Settings
from swaplora_server.service.adapters.host_tier import host_budget, open_host_tier

_log = structlog.get_logger(__name__)


def open_registry(
    settings: Settings,
    base: BaseModel,
    sources: Sources,
    listener: UsageListener,
    pinned_bytes: Callable[[str], int | None],
) -> Registry:
    """Of the adapters in the data directory, for this base; `listener` is told what becomes of them in memory.

    `pinned_bytes` is what a tenant may pin, None where nobody has said it.

    Raises AdapterError, UnsupportedModelError and OSError; nothing stays open then.
    """
    store = open_store(settings.data_dir, settings.shared_store, _shared_base(settings.base_id, base))
    for note in store.notes:
        _log.warning(note)
    for name, version, reason in store.quarantined:
        _log.warning("an adapter's files are damaged", adapter=name, version=version, reason=reason)
    try:
        return Registry(
            store,
            sources=sources,
            layers=base.layers,
            dtype=base.dtype,
            memory_budget=settings.adapter_memory_bytes,
            wait_seconds=settings.adapter_wait_seconds,
            keep_versions=settings.keep_versions,
            base_model=settings.base_id,
            placement=base.backend.placement,
            prepare=base.prepared,
            host=open_host_tier(host_budget(settings.host_adapter_bytes, base.device.type)),
            listener=listener,
            report=_report_shared,
            pinned_bytes=pinned_bytes,
        )
    except BaseException:
        store.close()
        raise


def put_folders(registry: Registry, folders: Mapping[str, Path]) -> None:
    """Take in adapters named one by one, name → folder. Raises AdapterError and OSError."""
    for name, folder in folders.items():
        put_folder(registry, name, folder)
        if name not in registry.names.index:
            _log.warning("an adapter was deleted, and stays so until its files change", adapter=name)


def report_ingest(name: str, error: Exception) -> None:
    """Log what was found in the adapter folder and could not be taken in."""
    _log.warning("an adapter of --adapter-dir cannot be taken in", adapter=name, reason=_reason(error))


def _shared_base(name: str, base: BaseModel) -> Base:
    """What all servers of one shared store are to have alike."""
    libraries = programs()
    read_by = ", ".join(f"{each} {libraries[each]}" for each in ("transformers", "tokenizers"))
    dtype = str(base.backend.products or base.dtype).removeprefix("torch.")
    return Base(name, dtype, *base.fingerprint, read_by)


def _report_shared(error: Exception) -> None:
    _log.error("the shared store is not as it should be", reason=_reason(error))


def _reason(error: Exception) -> str:
    """Of errors that are not ours no more than the system's own words: the rest may hold paths."""
    if isinstance(error, AdapterError | StoreError):
        return str(error)
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
