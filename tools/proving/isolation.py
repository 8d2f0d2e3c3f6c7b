"""`make isolation`: the proof that no request is ever answered with another's weights, on a real server.

The server has memory for three adapters. Two of them, and the base, decode long streams all the time; every other one
is swapped through the room that is left, alone, in sums, mixtures and under aliases.

1. Control: each adapter, sum and mixture and the base answers alone, twice. The two must agree, with PEFT too, and no
   two of them say the same.
2. Swaps: others are asked for, uploaded, replaced and deleted every 30 ms, and so are aliases of them and mixtures with
   them. Every token of the long streams, and every answer of the others, must be what the digest in its own header says
   alone, and that digest be the one which was acknowledged last.
3. Replaces: sixteen streams of one name that is replaced again and again, of which some ask an alias, a sum or a
   mixture that leads there. Each must be whole what its digest says.

`--servers 2` proves it of two on one shared store: streams of one model go to both by turns, and what one has
acknowledged is asked of the other at once. `--fault NAME` plants a fault first, which must make the proof fail: see
planted_faults.py.
"""

import argparse
import asyncio
import gc
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import httpx
import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file
from structlog.testing import capture_logs

import tiny
from isolation_asking import Servers
from isolation_proof import CONTEXT, MAX_PROBLEMS, NUM_MIXED, NUM_RESIDENT, Adapter, Proof, Workload
from isolation_report import Report
from isolation_truth import Truth
from planted_faults import FAULTS, FAULTS_OF_SEVERAL
from serving import Running, serving, settings
from soak import size
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_server.config import Settings

RANK = 8
BASE_SEED = 4  # of those that leave the controls without a tie
SEEN_SECONDS = 60.0  # that a request waits to know what others have changed: a slow machine is no store that is away


def make_adapters(base: Path, folder: Path, count: int, first_seed: int = 10) -> list[Path]:
    """Seeded ones, all of the same shape."""
    return [tiny.save_adapter(folder / f"a{n}", base, seed=first_seed + n, rank=RANK) for n in range(count)]


def put(client: httpx.Client, folder: Path) -> Adapter:
    """An adapter, uploaded under its folder's name."""
    files = {"config": (folder / CONFIG_FILE).read_bytes(), "weights": (folder / WEIGHTS_FILE).read_bytes()}
    answer = client.put(f"/v1/adapters/{folder.name}", files=files).raise_for_status()
    return Adapter(folder.name, files, answer.json()["digest"])


def make_base(folder: Path) -> Path:
    return tiny.save_tiny_base(folder, {**tiny.LLAMA, "max_position_embeddings": CONTEXT}, seed=BASE_SEED)


def make_settings(base: Path, adapter: Path, folder: Path, num_servers: int) -> list[Settings]:
    """How to start servers with memory for just NUM_RESIDENT such adapters each."""
    budget = NUM_RESIDENT * sum(tensor.nbytes for tensor in load_file(adapter / WEIGHTS_FILE).values())
    alone = settings(base, folder / "data", adapter_memory_bytes=budget)
    if num_servers == 1:
        return [alone]
    shared = folder / "shared"
    shared.mkdir()
    others = [{"data_dir": folder / f"data{n}", "shared_store": str(shared)} for n in range(num_servers)]
    return [alone.model_copy(update=own) for own in others]


def prove(workload: Workload, fault: str | None = None, num_servers: int = 1) -> Report:
    """Run the proof on servers of its own."""
    report, began = Report(), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch, capture_logs() as report.log:
        if fault is not None:
            {**FAULTS, **FAULTS_OF_SEVERAL}[fault](patch)
        report.count_loads(patch)
        patch.setattr("swaplora_server.service.service.SEEN_SECONDS", SEEN_SECONDS)
        base = make_base(Path(scratch) / "base")
        folders = make_adapters(base, Path(scratch) / "adapters", workload.num_adapters)
        with ExitStack() as stack:
            config = make_settings(base, folders[0], Path(scratch), num_servers)
            servers: list[Running] = [stack.enter_context(serving(each)) for each in config]
            prove_of([server.url for server in servers], base, folders, report, workload)
            gc.collect()
    report.seconds = time.monotonic() - began
    return report


def prove_of(urls: Sequence[str], base: Path, folders: Sequence[Path], report: Report, workload: Workload) -> None:
    """The same of servers that run, which have the same names."""
    with httpx.Client(base_url=urls[0], timeout=120) as client:
        adapters = [put(client, folder) for folder in folders]
    named = {adapter.digest: folder for adapter, folder in zip(adapters, folders, strict=True)}
    asyncio.run(_run(urls, adapters, Truth(base, named, NUM_MIXED), report, workload))


async def _run(urls: Sequence[str], adapters: list[Adapter], truth: Truth, report: Report, workload: Workload) -> None:
    limits = httpx.Limits(max_connections=None)
    async with AsyncExitStack() as stack:
        clients = [httpx.AsyncClient(base_url=url, timeout=120, limits=limits) for url in urls]
        for client in clients:
            await stack.enter_async_context(client)
        await Proof(Servers(clients), adapters, truth, report, workload).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=size(200, 10_000), help="how often to swap under long streams")
    parser.add_argument("--replaces", type=int, default=size(50, 1000), help="how often to replace one name")
    parser.add_argument("--servers", type=int, default=1, help="how many, on one shared store")
    parser.add_argument("--fault", choices=[*FAULTS, *FAULTS_OF_SEVERAL], help="a fault to plant first")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # PEFT still reads a property that transformers has renamed
    report = prove(Workload(arguments.swaps, arguments.replaces), arguments.fault, arguments.servers)
    Console().print(report.table())
    wrong = (entry for entry in report.log if entry["log_level"] not in ("debug", "info"))
    for line in [*report.problems[:MAX_PROBLEMS], *(f"the server's log: {entry}" for entry in wrong)]:
        Console().print(line, markup=False, highlight=False)
    if report.problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
