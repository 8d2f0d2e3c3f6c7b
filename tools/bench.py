"""`make bench`: throughput of a server of one's own, measured by `swaplora bench` in a second process.

Sixteen random adapters on every linear, 128 prompt tokens, 64 generated, greedy and sampled, 16 in flight and one.
Before anything is timed, each adapter's greedy tokens in a mixed batch must equal those it gives alone. What follows
`--` is handed to `swaplora serve`.
"""

import argparse
import asyncio
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from bench_compare import compare, read_results, section
from bench_rounds import FULL, QUICK, RATIOS, Round, Workload, machine_range, medians, ratios, tables
from server_process import process
from swaplora_server.bench.machine import measure_machine, versions
from swaplora_server.bench.table import machine_line, server_line
from swaplora_server.config import Settings
from swaplora_server.embedded import ensure_embedded_base

PROMPT_TOKENS, OUTPUT_TOKENS, NUM_ADAPTERS, RANK = 128, 64, 16, 16
MIXED_RANKS, NUM_REGISTERED, VOCAB_SIZE = (8, 16, 32, 64), 1000, 40_000
NAMES = [f"a{number}" for number in range(NUM_ADAPTERS)]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QWEN: Mapping[str, Any] = {  # the shape of Qwen2.5-0.5B
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
console = Console()


@dataclass(frozen=True)
class Run:
    """One measured workload; `report` is what `swaplora bench --json` printed."""

    label: str
    report: Mapping[str, Any]

    @property
    def tokens_per_second(self) -> float:
        return float(self.report["output_tokens_per_second"])


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    ttft: float  # seconds


def make_adapters(base: Path, folder: Path, count: int, ranks: Sequence[int] = (RANK,)) -> None:
    """Random adapters with non-zero B, in bfloat16; `ranks` go round."""
    for first, rank in enumerate(ranks):
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        model = get_peft_model(plain, config, autocast_adapter_dtype=False)
        for number in range(first, count, len(ranks)):
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        scale = 0.1 / rank**0.5 if "lora_B" in name else parameter.shape[1] ** -0.5
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            model.save_pretrained(folder / f"a{number}")


def make_small_adapters(source: Path, folder: Path, count: int) -> None:
    """Adapters of rank 1 on one linear, cut out of `source` and no two alike, which need only be registered."""
    tensors = load_file(source / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    config |= {"r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}
    cut = {name: tensor for name, tensor in tensors.items() if "q_proj" in name}
    for number in range(count):
        (folder / f"s{number}").mkdir(parents=True)
        (folder / f"s{number}" / "adapter_config.json").write_text(json.dumps(config))
        first = {name: tensor[:1] if "lora_A" in name else tensor[:, :1] for name, tensor in cut.items()}
        scaled = {name: (tensor * (1 + number)).contiguous() for name, tensor in first.items()}
        save_file(scaled, folder / f"s{number}" / "adapter_model.safetensors")


def make_random_base(folder: Path, tokenizer: Path, shape: Mapping[str, Any] = QWEN) -> None:
    """A model of `shape` with random weights in bfloat16, and beside it the tokenizer of another base."""
    ids = {name: getattr(AutoConfig.from_pretrained(tokenizer), name) for name in ("bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**shape, **ids), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in [*tokenizer.glob("tokenizer*"), *tokenizer.glob("special_tokens*"), *tokenizer.glob("chat_template*")]:
        shutil.copy(file, folder)


def prompt(number: int) -> list[int]:
    rng = random.Random(number)
    return [rng.randrange(100, VOCAB_SIZE) for _ in range(PROMPT_TOKENS)]


async def complete(client: httpx.AsyncClient, model: str, number: int, num_tokens: int = OUTPUT_TOKENS) -> Answer:
    body = {
        "model": model,
        "prompt": prompt(number),
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    began, first, ids = time.perf_counter(), None, []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter()
                ids += json.loads(line[6:])["choices"][0]["token_ids"]
    assert first is not None
    return Answer(ids, first - began)


async def check(url: str) -> None:
    """Each adapter's tokens in a mixed batch equal those it gives alone, and are not the base's."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        mixed = await asyncio.gather(*(complete(client, name, 0) for name in NAMES))
        alone = [await complete(client, name, 0) for name in NAMES]
        base = await complete(client, "base", 0)
    if [answer.token_ids for answer in mixed] != [answer.token_ids for answer in alone]:
        raise SystemExit("answers in a mixed batch differ from those given alone: not measured")
    if any(answer.token_ids == base.token_ids for answer in alone):
        raise SystemExit("an adapter gave the base's answer: not measured")


async def drive(url: str, label: str, adapters: Sequence[str], num_requests: int, concurrency: int, *flags: str) -> Run:
    """Run `swaplora bench` in a process of its own; `adapters` are asked in turn, or the base if there are none."""
    command = ["--url", url, "--base", "base", "--requests", str(num_requests), "--concurrency", str(concurrency)]
    command += ["--warmup", str(concurrency), "--vocab-size", str(VOCAB_SIZE), *flags, "--json"]
    if adapters:
        command += ["--adapters", ",".join(adapters)]
    command += ["--prompt-tokens", str(PROMPT_TOKENS), "--output-tokens", str(OUTPUT_TOKENS)]
    generator = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "swaplora_server", "bench", *command, stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await generator.communicate()
    report = json.loads(printed) if printed else {}
    if generator.returncode or report["failed"] or report["short"]:
        raise SystemExit(f"{label}: not every request was answered whole: {report.get('first_failure')}")
    return Run(label, report)


def measure(url: str, workload: Workload, num_requests: int, seed: int) -> Run:
    """One run. No two have prompts in common, so that none finds another's in a cache."""
    adapters = [] if workload.distribution == "base" else NAMES
    count = num_requests if workload.concurrency > 1 else 6
    flags = ["--distribution", workload.distribution, *workload.sampling, "--seed", str(seed)]
    run = asyncio.run(drive(url, workload.label, adapters, count, workload.concurrency, *flags))
    console.print(f"  {workload.label}: {run.tokens_per_second:.1f} tok/s")
    return run


def register(client: httpx.Client, folder: Path) -> None:
    """Upload what the server does not have yet: once, for its data are kept."""
    known = {model["id"] for model in client.get("/v1/models").json()["data"]}
    for adapter in folder.iterdir():
        if adapter.name not in known:
            config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
            files = {"config": config.read_bytes(), "weights": weights.read_bytes()}
            client.put(f"/v1/adapters/{adapter.name}", files=files).raise_for_status()


def prepare(base: Path, cache: Path, ranks: Sequence[int], servers: Collection[str]) -> None:
    """Make the adapters that these servers need, unless an earlier run has."""
    recipes: Mapping[str, Callable[[Path], None]] = {
        "16": lambda folder: make_adapters(base, folder, NUM_ADAPTERS, ranks),
        "mixed": lambda folder: make_adapters(base, folder, NUM_ADAPTERS, MIXED_RANKS),
        "1000": lambda folder: make_small_adapters(cache / "16" / "a0", folder, NUM_REGISTERED - NUM_ADAPTERS),
    }
    for name, recipe in recipes.items():
        if name in servers:
            make_once(cache / name, recipe)


def make_once(folder: Path, recipe: Callable[[Path], None]) -> Path:
    """The folder that `recipe` fills; it appears when it is whole."""
    if not folder.is_dir():
        console.print(f"making {folder}")
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        recipe(part)
        part.rename(folder)
    return folder


def measure_server(
    base: Path, cache: Path, workloads: Sequence[Workload], number: int, arguments: argparse.Namespace
) -> Round:
    """Start the server of these workloads and run round `number` of them on it."""
    server = workloads[0].server
    folder = [] if server == "none" else ["--adapter-dir", str(cache / ("16" if server == "1000" else server))]
    flags = ["--served-model-name", "base", *folder, "--kv-cache-bytes", "1GiB", *arguments.server_flags]
    with tempfile.TemporaryDirectory() as scratch:
        data = cache / "1000-data" if server == "1000" else Path(scratch)
        with process(base, data, *flags) as (running, client):
            if server == "1000":
                register(client, cache / "1000")
            return measure_running(running.pid, str(client.base_url), workloads, number, arguments.requests)


def measure_running(pid: int, url: str, workloads: Sequence[Workload], number: int, num_requests: int) -> Round:
    """Check the answers, where adapters give them, and then run these workloads."""
    server, reports = workloads[0].server, {}
    if server != "none":
        asyncio.run(check(url))
    for each in workloads:
        reports[each.label] = measure(url, each, num_requests, number * len(FULL) + FULL.index(each)).report
    console.print(f"  memory of the server with adapters registered: {server}: {resident_mib(pid)} MiB")
    return reports


def resident_mib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) // 1024


def machine() -> str:
    """What this machine can do, measured now."""
    return f"{machine_line(measure_machine())}; torch {torch.__version__}"


def chosen_base(arguments: argparse.Namespace, cache_dir: Path) -> Path:
    if arguments.base:
        return Path(arguments.base)
    embedded = ensure_embedded_base(cache_dir, console.print)
    if not arguments.random_base:
        return embedded
    return make_once(cache_dir / "bench" / "random-qwen2.5-0.5b", lambda folder: make_random_base(folder, embedded))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of all workloads; medians count")
    parser.add_argument("--requests", type=int, default=64, help="of each workload with 16 in flight")
    parser.add_argument("--quick", action="store_true", help="one round of the first seven workloads")
    parser.add_argument("--json", metavar="FILE", help="for every figure (default: in the cache; - is stdout)")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="JSON", help="two runs, and measure nothing")
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="a run as a page shows it; measure nothing")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--base", help="a local folder (default: the embedded base)")
    which.add_argument("--random-base", action="store_true", help="Qwen2.5-0.5B's shape, and adapters of mixed ranks")
    parser.add_argument("server_flags", nargs="*", help="after --: flags of swaplora serve")
    arguments = parser.parse_args()
    if arguments.json not in (None, "-") and not Path(arguments.json).parent.is_dir():
        parser.error(f"--json {arguments.json}: there is no such folder")  # found out before, and not after, all rounds
    return arguments


def main() -> None:
    arguments = options()
    if arguments.compare or arguments.markdown:
        show_results(arguments)
    else:
        run_all(arguments, Settings().cache_dir)


def show_results(arguments: argparse.Namespace) -> None:
    """Of runs that have ended; in plain lines, as they go into a page."""
    runs = [read_results(file) for file in arguments.compare or [arguments.markdown]]
    for line in compare(*runs) if arguments.compare else section(*runs):
        console.out(line, highlight=False)


def run_all(arguments: argparse.Namespace, cache_dir: Path) -> None:
    """Measure, and write every figure."""
    console.stderr = arguments.json == "-"
    base = chosen_base(arguments, cache_dir)
    cache = cache_dir / "bench" / f"{base.name}-{hashlib.sha256((base / 'config.json').read_bytes()).hexdigest()[:12]}"
    workloads = QUICK if arguments.quick else FULL
    servers = list(dict.fromkeys(each.server for each in workloads))
    prepare(base, cache, MIXED_RANKS if arguments.random_base else (RANK,), servers)
    found: dict[str, Any] = {
        "machine": measure_machine(),
        "versions": versions() | {name: version(name) for name in ("torch", "transformers")},
        "base": base.name,
        "server_flags": arguments.server_flags,
        "rounds": [],
    }
    for number in range(1 if arguments.quick else arguments.rounds):
        console.print(f"round {number + 1}")
        of_servers = [[each for each in workloads if each.server == server] for server in servers]
        measured = [measure_server(base, cache, each, number, arguments) for each in of_servers]
        found["rounds"].append({label: report for part in measured for label, report in part.items()})
    found |= {"medians": medians(found["rounds"]), "ratios": ratios(found["rounds"], RATIOS)}
    kept = write_json(found, arguments.json or cache / "results.json")
    last = list(found["rounds"][-1].values())[-1]
    for line in [
        *tables(found["medians"], found["ratios"]),
        machine_line(found["machine"]),
        server_line(last["server"]),
        machine_range(found["rounds"]),
        f"every figure: {kept}",
    ]:
        console.print(line, soft_wrap=True)


def write_json(found: Mapping[str, Any], file: str | Path) -> str:
    """Write it there, `-` being stdout; returns what to call the place."""
    content = json.dumps(found, indent=2)
    if file == "-":
        print(content)  # noqa: T201 - the one thing on stdout
        return "stdout"
    Path(file).write_text(content)
    return str(file)


if __name__ == "__main__":
    main()
