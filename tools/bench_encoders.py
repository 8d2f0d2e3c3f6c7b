"""`make bench-encoders`: vectors of texts by an encoder, beside sentence-transformers in one process, and over HTTP.

    make bench-encoders ARGS="FOLDER"

FOLDER is a sentence-transformers model. Rounds of all workloads take turns; the median counts, and ratios are taken
within a round. Before anything is timed, every vector of a base in float32 must be the peer's within 1e-5, and an
adapter's must have the same bits in a mixed batch as alone. The peer is no dependency of this project: install it,
without torch, where Python finds it (`pip install --no-deps --target DIR sentence-transformers` and what it imports,
then PYTHONPATH).
"""

import argparse
import asyncio
import base64
import importlib
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from server_process import process
from swaplora_server.base.encoder.encoder_base import EncoderBase
from swaplora_server.base.loading import load_chosen_base
from swaplora_server.bench.machine import measure_machine
from swaplora_server.bench.table import machine_line
from swaplora_server.config import Settings
from swaplora_server.engine.engine import Engine
from swaplora_server.engine.request import Request, SamplingParams, TokenEvent
from swaplora_server.service.pooling.embeddings import embeddings
from swaplora_server.service.pooling.encoder_engine import encoder_engine

NUM_ADAPTERS, RANK, NUM_TEXTS = 16, 16, 32
NAMES = [f"a{number}" for number in range(NUM_ADAPTERS)]
CACHE = Path(".cache")
Vectors = NDArray[np.float32]
Timed = Callable[[], object]


def texts_of(words: Sequence[str], lengths: Sequence[int], seed: int) -> list[str]:
    """Words that are one token each; `lengths` count the two special tokens."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=length - 2)) for length in lengths]


def save_adapters(base: Path, folder: Path) -> None:
    """Random ones with non-zero B on every linear of the layers."""
    for number, name in enumerate(NAMES):
        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", exclude_modules=["pooler.dense"],
            task_type="FEATURE_EXTRACTION",
        )  # fmt: skip
        model = get_peft_model(AutoModel.from_pretrained(base, dtype=torch.float32), config)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for path, weight in model.named_parameters():
                if "lora_B" in path:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
        model.save_pretrained(folder / name)


class InProcess:
    """An engine over the base, asked for vectors of texts as the server asks it: tokens, steps, length 1."""

    def __init__(self, base: EncoderBase, engine: Engine) -> None:
        self._base = base
        self._engine = engine

    def __call__(self, texts: Sequence[str]) -> Vectors:
        all_ids = self._base.tokenizer(list(texts))["input_ids"]
        left, done = threading.Semaphore(0), SamplingParams(max_tokens=0)

        def heard(_event: TokenEvent) -> None:
            left.release()

        requests = [Request("bench", tuple(ids), done, heard, reads=self._base.pooling) for ids in all_ids]
        for request in requests:
            self._engine.submit(request)
        for _ in requests:
            left.acquire()
        vectors = [request.hidden for request in requests if request.hidden is not None]
        return np.stack(embeddings(vectors, None, normalises=self._base.pooling.normalises))


@contextmanager
def in_process(source: Path, dtype: str) -> Iterator[InProcess]:
    settings = Settings(base=str(source), dtype=dtype, device="cpu", cache_dir=CACHE)
    base = load_chosen_base(settings, lambda _message: None)
    assert isinstance(base, EncoderBase)
    engine = encoder_engine(base, settings, settings.max_num_seqs, base.max_positions)
    engine.start()
    try:
        yield InProcess(base, engine)
    finally:
        engine.stop()


class OverHttp:
    """A server in a process of its own, asked by one client."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(self, requests: Sequence[tuple[str, Sequence[str]]]) -> list[Vectors]:
        """All at once; each a model and its texts."""
        return asyncio.run(self._all(requests))

    async def _all(self, requests: Sequence[tuple[str, Sequence[str]]]) -> list[Vectors]:
        async with httpx.AsyncClient(base_url=self._url, timeout=600) as client:
            return list(await asyncio.gather(*(self._one(client, *request) for request in requests)))

    async def _one(self, client: httpx.AsyncClient, model: str, texts: Sequence[str]) -> Vectors:
        body = {"model": model, "input": list(texts), "encoding_format": "base64"}
        answer = await client.post("/v1/embeddings", json=body)
        answer.raise_for_status()
        return np.stack([np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in answer.json()["data"]])


def in_turns(
    workloads: Mapping[str, Timed], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each in each round, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in workloads}
    for number in range(rounds + 1):
        for name, run in workloads.items():
            began = clock()
            run()
            if number:
                seconds[name].append(clock() - began)
    return seconds


def check(what: str, found: Vectors, right: Vectors, tolerance: float) -> float:
    """The largest difference. Ends the program where it is beyond the tolerance."""
    error = float(np.abs(found - right).max())
    if not error <= tolerance:
        raise SystemExit(f"{what} is off by {error:.2g}: not measured")
    return error


def report(title: str, seconds: Mapping[str, list[float]], num_tokens: int, over: str) -> None:
    print(f"\n{title}\n\n| | tokens/s | times {over} |\n| --- | --- | --- |")  # noqa: T201
    for name, own in seconds.items():
        ratio = statistics.median(base / one for base, one in zip(seconds[over], own, strict=True))
        print(f"| {name} | {num_tokens / statistics.median(own):,.0f} | {ratio:.2f} |")  # noqa: T201


def beside_peer(base: Path, words: Sequence[str], rounds: int, clock: Callable[[], float]) -> None:
    """The engine in float32 and bfloat16, and sentence-transformers in float32."""
    try:
        library: Any = importlib.import_module("sentence_transformers")
    except ImportError as missing:
        raise SystemExit(f"sentence-transformers cannot be imported ({missing}): {__doc__}") from missing
    peer = library.SentenceTransformer(str(base), device="cpu")
    longest = min(256, peer.max_seq_length)
    rng = random.Random(0)
    cases = {
        "32 texts of 128 tokens": [128] * NUM_TEXTS,
        f"128 texts of 8 to {longest} tokens": [rng.randint(8, longest) for _ in range(4 * NUM_TEXTS)],
        "32 texts of 16 tokens": [16] * NUM_TEXTS,
        "one text of 16 tokens": [16],
    }
    encode = partial(peer.encode, batch_size=NUM_TEXTS)
    with in_process(base, "fp32") as exact, in_process(base, "bf16") as rounded:
        for number, (title, lengths) in enumerate(cases.items()):
            texts = texts_of(words, lengths, number)
            right = encode(texts)
            check("float32", exact(texts), right, 1e-5)
            error = check("bfloat16", rounded(texts), right, 0.01)
            runs: dict[str, Timed] = {
                "sentence-transformers, float32": partial(encode, texts),
                "float32": partial(exact, texts),
                f"bfloat16, off by {error:.1g}": partial(rounded, texts),
            }
            report(title, in_turns(runs, rounds, clock), sum(lengths), next(iter(runs)))


def over_http(base: Path, words: Sequence[str], rounds: int, dtype: str) -> None:
    """The base and sixteen adapters in one server: one request of 32 texts, and sixteen at once of two."""
    with tempfile.TemporaryDirectory() as scratch:
        save_adapters(base, Path(scratch) / "adapters")
        flags = ["--served-model-name", "base", "--dtype", dtype, "--adapter-dir", f"{scratch}/adapters"]
        with process(base, Path(scratch) / "data", *flags) as (_, client):
            ask = OverHttp(str(client.base_url))
            texts = texts_of(words, [128] * NUM_TEXTS, 9)
            pairs = [texts[number : number + 2] for number in range(0, NUM_TEXTS, 2)]
            of_base = [("base", pair) for pair in pairs]
            mixed = list(zip(NAMES, pairs, strict=True))
            plain = ask(of_base)
            for one, together, other in zip(mixed, ask(mixed), plain, strict=True):
                check("an adapter in a mixed batch", together, ask([one])[0], 0.0)
                if np.abs(together - other).max() < 0.01:
                    raise SystemExit("an adapter gave the base's answer: not measured")
            runs: dict[str, Timed] = {
                "16 requests of 2 texts, base": partial(ask, of_base),
                "16 adapters": partial(ask, mixed),
                "one adapter": partial(ask, [("a0", pair) for pair in pairs]),
                "one request of 32 texts, base": partial(ask, [("base", texts)]),
            }
            report(f"over HTTP, {dtype}", in_turns(runs, rounds), 128 * NUM_TEXTS, next(iter(runs)))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="a folder with a sentence-transformers model")
    parser.add_argument("--rounds", type=int, default=7, help="of all workloads; medians count")
    parser.add_argument("--one-thread", action="store_true", help="its processor time, where other work is beside it")
    parser.add_argument("--only", choices=("peer", "http"), help="one half of it")
    return parser.parse_args()


def main() -> None:
    arguments: Any = options()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.base)
    words = [word for word in sorted(tokenizer.get_vocab()) if word.isalpha() and word.isascii() and len(word) > 3]
    print(machine_line(measure_machine()))  # noqa: T201
    if arguments.only != "http":
        if arguments.one_thread:
            torch.set_num_threads(1)
        clock = time.process_time if arguments.one_thread else time.perf_counter
        beside_peer(arguments.base, words, arguments.rounds, clock)
    if arguments.only != "peer":
        for dtype in ("fp32", "bf16"):
            over_http(arguments.base, words, arguments.rounds, dtype)


if __name__ == "__main__":
    main()
