"""The folders that a server writes to: whether it may, what is free, and how fast a write is durable."""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from swaplora_server.banner import human_bytes
from swaplora_server.config import Settings
from swaplora_server.doctor.finding import Effect, Finding

SLOW_SYNC_SECONDS = 0.05
NUM_SYNCS = 5


def disk_findings(settings: Settings) -> Iterator[Finding]:
    """Nothing is left behind; a folder that is not there yet is not made."""
    yield _folder("data folder", settings.data_dir, settings.max_adapter_bytes, "--data-dir")
    yield _folder("cache folder", settings.cache_dir, 2**30, "--cache-dir")


def _folder(subject: str, folder: Path, wanted: int, flag: str) -> Finding:
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        seconds = sync_seconds(there)
    except OSError as error:
        remark = f"the server cannot write there ({error.strerror}): choose another {flag}"
        return Finding(subject, str(folder), remark, Effect.FAILS)
    free = shutil.disk_usage(there).free
    return Finding.of(
        subject,
        f"{folder}, {human_bytes(free)} free, a durable write in {seconds * 1000:.1f} ms",
        f"less is free than {human_bytes(wanted)}, which one file may take" if free < wanted else "",
        "writes are slow to be durable, so that uploads wait for them" if seconds > SLOW_SYNC_SECONDS else "",
    )


def sync_seconds(folder: Path) -> float:
    """The median time of a small write and its sync. Raises OSError where nothing can be written."""
    times = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(NUM_SYNCS):
            began = time.perf_counter()
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times)
