"""What many tests share: a tiny base on disk, adapters for it, and a server of them that lives for a module."""

import gc
import os
import shutil
import ssl
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

# read when torch is loaded, and by programs that tests start: threads that wait for each other in native code sleep.
# Those of two processes would else keep each other from the processors that both wait for.
os.environ["OMP_WAIT_POLICY"] = "passive"

import hypothesis
import pytest
import structlog
import torch
import transformers

import tiny
from forked import Forked
from kernel_variants import compile_once
from serving import Running, serving, settings
from swaplora_adapters.derive import process
from swaplora_server.engine.runner import Runner
from swaplora_server.engine.scheduling.batch import Batch, Sampled
from swaplora_server.kernels.cpu import build

collect_ignore = [] if find_spec("ray") else ["ray"]  # `make test-ray` installs it, and runs these
MEMORY = Path("/dev/shm")
ROOM_BYTES = 4 << 30  # several times what all tests write, so that small machines and containers go on using the disk

# how long an example takes says how busy the machine is, and nothing else
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")
torch.set_num_threads(2)
# as the server has it: with all local variables a traceback takes the engine's thread for seconds
_console = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
structlog.configure(processors=[*structlog.get_config()["processors"][:-1], _console])
transformers.logging.disable_progress_bar()
# every client of httpx reads all certificates, whatever it asks; the arguments are hashable
ssl.create_default_context = cache(ssl.create_default_context)  # type: ignore[assignment]
build._compile_one = compile_once  # noqa: SLF001
gc.disable()  # what tests import stays: Python's collector need not go through it while they are collected, nor later
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM_BYTES:
    tempfile.tempdir = str(MEMORY)  # of tmp_path too; a disk's fsync is what most of these tests would wait for


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # libraries that count their objects at the end are to find none


@pytest.fixture(scope="session", autouse=True)
def _forked_derivations() -> Iterator[None]:
    """What computes for a server of this process is forked, but for the tests of how it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "Popen", Forked)
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with grouped heads and a tied head."""
    return tiny.save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eight adapters of ranks 1 to 64 on every linear, no two alike."""
    folder = tmp_path_factory.mktemp("adapters")
    ranks = (1, 2, 4, 7, 8, 16, 32, 64)
    return [tiny.save_adapter(folder / f"a{n}", base, seed=n, rank=rank) for n, rank in enumerate(ranks)]


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of the tiny base with nothing uploaded yet."""
    with serving(settings(base, tmp_path_factory.mktemp("data"))) as running:
        yield running


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """What the engine has run since the test began."""
    steps, run = [], Runner.run

    def noting(self: Runner, batch: Batch) -> list[Sampled]:
        steps.append(batch)
        return run(self, batch)

    monkeypatch.setattr(Runner, "run", noting)
    return steps
