"""A thousand adapters on disk, three of them damaged: all others are served, and the three are named."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import crash
from swaplora_adapters.errors import AdapterFailedError
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE

NUM_ADAPTERS = 1000
DAMAGE: dict[str, Callable[[Path], object]] = {
    "a0250": lambda blob: os.truncate(blob / WEIGHTS_FILE, 100),
    "a0500": lambda blob: (blob / CONFIG_FILE).unlink(),
    "a0750": lambda blob: (blob / WEIGHTS_FILE).write_bytes(bytes((blob / WEIGHTS_FILE).stat().st_size)),
}
FOUND_BY_SIZE = ["a0250", "a0500"]


def resident_bytes() -> int:
    """This process's memory."""
    num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return num_pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A thousand adapters, no two alike, written without waiting for the disk."""
    with pytest.MonkeyPatch.context() as patch, crash.opened(tmp_path) as (_store, registry):
        patch.setattr(os, "fsync", lambda _descriptor: None)
        for number in range(NUM_ADAPTERS):
            crash.put(registry, f"a{number:04}", number)
    return tmp_path


def test_a_thousand_adapters_are_there_after_a_start_and_the_damaged_ones_are_named(data_dir: Path) -> None:
    with crash.opened(data_dir) as (store, registry):
        assert store.quarantined == []
        for name, damage in DAMAGE.items():
            damage(store.blob_paths(registry.names.index.resolve(name).digest).config.parent)
    before, started = resident_bytes(), time.monotonic()
    with crash.opened(data_dir) as (store, registry):
        seconds, growth = time.monotonic() - started, resident_bytes() - before
        crash.report(f"{NUM_ADAPTERS} adapters: {1000 * seconds:.0f} ms to open, {growth / 2**20:.1f} MiB")
        assert [name for name, _version, _reason in store.quarantined] == FOUND_BY_SIZE
        assert [card.record.name for card in registry.cards()] == [f"a{number:04}" for number in range(NUM_ADAPTERS)]
        for record in [card.record for card in registry.cards()]:
            request_leases = registry.lease_weights([registry.lease(record.name)])
            if record.name in DAMAGE:
                with pytest.raises(AdapterFailedError, match="its stored"):
                    request_leases.weights.result(60)
            else:
                assert request_leases.weights.result(60)[record.digest].digest == record.digest
            request_leases.release()
        failed = {card.record.name: card.reason for card in registry.cards() if card.state == "failed"}
        assert failed.keys() == DAMAGE.keys()
        registry.check_integrity()
