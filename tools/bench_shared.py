"""`make bench-shared`: what several servers on one shared store cost, and how soon one knows what another has taken.

First servers in this process, two with a store, which is a folder, and one without, asked by one client. Then some in
processes of their own: tokens per second of one without a store, of one with it and of two, `--ray` also of one and two
replicas behind a front, with the same requests in flight in all. A tiny base, so that what is not computing shows most.
"""

import argparse
import asyncio
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import httpx
import pytest
import structlog
import torch
import transformers
from rich.console import Console
from rich.table import Table

import tiny
from server_process import SMALL, process
from serving import Running, serving, settings
from swaplora_adapters.store.shared import store as shared_store
from swaplora_adapters.store.shared.address import open_objects
from swaplora_adapters.store.shared.objects import Objects
from swaplora_server.bench.connection import Endpoint
from swaplora_server.bench.load import drive
from swaplora_server.bench.options import Lengths, Options

PROMPT = [97, 31, 200, 5, 66, 142]
IN_FLIGHT, NUM_ADAPTERS, NUM_REQUESTS = 16, 4, 160
SLOW_SECONDS = 0.02

console = Console()


class Slowed:
    """Objects whose every call takes `seconds` longer."""

    seconds = 0.0

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def __getattr__(self, call: str) -> Callable[..., object]:
        time.sleep(self.seconds)
        found: Callable[..., object] = getattr(self._objects, call)
        return found


@contextmanager
def three_servers(base: Path, folder: Path) -> Iterator[list[Running]]:
    """Two with one store, and one without."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(shared_store, "open_objects", lambda address: Slowed(open_objects(address)))
        (folder / "shared").mkdir()
        stores = [str(folder / "shared")] * 2 + [None]
        config = [settings(base, folder / f"data{n}", shared_store=store) for n, store in enumerate(stores)]
        yield [stack.enter_context(serving(each)) for each in config]


def known(server: Running, name: str) -> None:
    """Wait until it is, where nobody asks: a request would have the server look."""
    while name not in server.service.registry.names.index:
        time.sleep(0.001)


class Figures:
    """Milliseconds of everything, in the order in which it was first seen."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {}

    def note(self, what: str, job: Callable[..., object], *arguments: object) -> None:
        began = time.perf_counter()
        job(*arguments)
        self.found.setdefault(what, []).append(1e3 * (time.perf_counter() - began))

    def table(self, title: str) -> Table:
        table = Table("what", "ms", "longest", title=title)
        for what, found in self.found.items():
            table.add_row(what, f"{median(found):.3g}", f"{max(found):.3g}")
        return table


def latencies(base: Path, folder: Path, num_rounds: int) -> Table:
    figures = Figures()
    adapters = [tiny.save_adapter(folder / f"l{n}", base, seed=n, rank=8) for n in range(2 * num_rounds)]
    with three_servers(base, folder) as (one, other, alone):

        def ask(server: Running, name: str) -> None:
            server.token_ids(name, PROMPT, 1)

        def look() -> None:
            other.service.registry.seen().result()

        for number, (asked, unasked) in enumerate(zip(adapters[::2], adapters[1::2], strict=True)):
            figures.note("an upload, with the store", one.put, f"asked-{number}", asked)
            figures.note("from its acknowledgement to the first answer on the other", ask, other, f"asked-{number}")
            figures.note("an upload, without", alone.put, f"asked-{number}", asked)
            one.put(f"unasked-{number}", unasked)
            figures.note("from its acknowledgement until the other knows it unasked", known, other, f"unasked-{number}")
            for server, which in ((other, "with the store"), (alone, "without")):
                ask(server, "asked-0")
                figures.note(f"a request, {which}", ask, server, "asked-0")
            figures.note("a look at the log", look)
            Slowed.seconds = SLOW_SECONDS
            figures.note(f"a look, {1e3 * SLOW_SECONDS:.0f} ms added to each call", look)
            Slowed.seconds = 0.0
    return figures.table(f"servers in one process, medians of {num_rounds}")


def throughput(base: Path, folder: Path, num_rounds: int, is_ray: bool) -> Table:
    """The median of some rounds, each of all of them in turn."""
    adapters = [tiny.save_adapter(folder / f"t{n}", base, seed=n, rank=8) for n in range(NUM_ADAPTERS)]
    for name in ("store", "behind-one", "behind-two"):
        (folder / name).mkdir()
    store = ("--shared-store", str(folder / "store"))
    ways: dict[str, list[tuple[str, ...]]] = {
        "one server": [()],
        "one with the store": [store],
        "two with the store": [store, store],
    }
    if is_ray:
        for count, word in enumerate(("one", "two"), start=1):
            shared = ("--ray", "--ray-replicas", str(count), "--shared-store", str(folder / f"behind-{word}"))
            ways[f"{word} on Ray Serve behind a front"] = [shared]
    figures: dict[str, list[float]] = {way: [] for way in ways}
    with ExitStack() as stack:
        urls: dict[str, list[str]] = {}
        for way, flags in ways.items():
            clients = [
                stack.enter_context(process(base, folder / f"{way}-{n}", "--served-model-name", "base", *SMALL, *each))[
                    1
                ]
                for n, each in enumerate(flags)
            ]
            upload(clients[0], adapters)
            urls[way] = [str(client.base_url) for client in clients]
        for number in range(num_rounds):
            for way, found in figures.items():
                found.append(asyncio.run(tokens_per_second(urls[way], number)))
    table = Table("way", "tokens per second", "of one server", title=f"{IN_FLIGHT} in flight, medians of {num_rounds}")
    rates = {way: median(found) for way, found in figures.items()}
    for way, rate in rates.items():
        spread = f"{min(figures[way]):.0f} to {max(figures[way]):.0f}"
        table.add_row(way, f"{rate:.0f} ({spread})", f"{rate / rates['one server']:.2f}")
    return table


def upload(client: httpx.Client, adapters: Sequence[Path]) -> None:
    for folder in adapters:
        config, weights = (folder / name for name in ("adapter_config.json", "adapter_model.safetensors"))
        files = {"config": config.read_bytes(), "weights": weights.read_bytes()}
        client.put(f"/v1/adapters/{folder.name}", files=files).raise_for_status()


async def tokens_per_second(urls: Sequence[str], seed: int) -> float:
    """Of all servers together, each of which is sent its share of the requests. Every answer must be whole."""
    share = len(urls)
    loads = await asyncio.gather(
        *(
            drive(
                Options(
                    url=url,
                    adapters=tuple(f"t{n}" for n in range(NUM_ADAPTERS)),
                    distribution="distinct",
                    concurrency=IN_FLIGHT // share,
                    requests=NUM_REQUESTS // share,
                    prompt_tokens=Lengths(32, 32),
                    output_tokens=Lengths(16, 16),
                    vocab_size=250,
                    seed=seed,
                    warmup=IN_FLIGHT,
                ),
                Endpoint.of(url, None),
            )
            for url in urls
        )
    )
    answers = [answer for load in loads for answer in load.answers]
    if failures := {answer.failure for answer in answers if answer.failure}:
        raise RuntimeError(f"{len(failures)} kinds of failure, such as {failures.pop()}")
    return sum(sum(answer.num_output_tokens for answer in load.answers) / load.seconds for load in loads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of throughput; four times as many of the rest")
    parser.add_argument("--ray", action="store_true", help="replicas behind a front, too; needs `make test-ray` once")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    torch.set_num_threads(2)
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # PEFT still reads a property that transformers has renamed
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        folder = Path(scratch)
        base = tiny.save_tiny_base(folder / "base")
        console.print(latencies(base, folder, 4 * arguments.rounds))
        console.print(throughput(base, folder, arguments.rounds, arguments.ray))


if __name__ == "__main__":
    main()
