"""Tiny bases served on the card: the start-up proof, and PEFT as the oracle, in the engine and over HTTP."""

import asyncio
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import torch
from torch import Tensor

import isolation
import isolation_proof
import kinds_table
import peft_kinds
import tiny
from architectures import ARCHITECTURES
from gpu_checks.card import Card
from gpu_checks.report import Report
from kinds_batch import Company, gathered
from oracle import Oracle
from serving import BASE, serving, settings
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.weights.load import load_weights
from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.base import device_memory
from swaplora_server.base.base_model import BaseModel, load_base
from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.config import Settings
from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.request import AdapterUse, Request, SamplingParams, Sequence
from swaplora_server.engine.scheduling.batch import Batch, rows_of
from swaplora_server.service.service import Service

NOISE = 3.0  # how far bf16 may be from fp32, in what PEFT's own bf16 is
LEAST_NOISE = 0.02  # of a log-probability


def prove_architectures(report: Report, card: Card, scratch: Path) -> dict[str, Any]:
    """Load, wrap and prove tiny models of many architectures, in both number formats."""
    chosen = dict(list(ARCHITECTURES.items())[:: 6 if card.is_dry else 1])
    refused: dict[str, str] = {}
    for model_type, fields in chosen.items():
        folder = tiny.save_tiny_base(scratch / model_type, {"model_type": model_type, **fields})
        for dtype in (torch.float32, torch.bfloat16):
            try:
                load_base(folder, device=card.device, dtype=dtype, backend=card.backend(dtype))
            except UnsupportedModelError as error:
                refused[f"{model_type} {dtype}"] = str(error)
                report.problem(f"not proven on the card: {model_type} in {dtype}: {error}")
    report.row("architectures proven at start, fp32 and bf16", f"{2 * len(chosen) - len(refused)} of {2 * len(chosen)}")
    return {"proven": list(chosen), "refused": refused}


def compare_kinds(report: Report, card: Card, scratch: Path) -> dict[str, Any]:
    """Every kind of adapter in the engine, fp32: alone, in a mixed step, in a sum, merged; against PEFT."""
    warnings.simplefilter("ignore")
    cells: dict[str, tuple[str, ...]] = {}
    for name in ["llama"] if card.is_dry else peft_kinds.BASES:
        base = peft_kinds.save_base(name, scratch / f"kinds-{name}")
        made = list(kinds_table.make_all(name, base, scratch / f"kinds-{name}-adapters"))
        for each in made:
            each.oracle.to(card.device)
        if card.is_dry:
            made = made[:3] + [each for each in made if each.kind == "partner"]
        bench = kinds_table.Bench(base, card.backend(torch.float32), card.device)
        cells |= kinds_table.measure(bench, made)
    wrong = {kind: told for kind, told in cells.items() if kinds_table.WRONG in told}
    for kind, told in wrong.items():
        report.problem(f"{kind}: {dict(zip(kinds_table.COLUMNS, told, strict=True))}")
    report.row("kinds of adapter that are PEFT's, fp32, in the engine", f"{len(cells) - len(wrong)} of {len(cells)}")
    return {"cells": cells}


def compare_bf16(report: Report, card: Card, scratch: Path) -> dict[str, Any]:
    """A mixed step in bf16: as near to PEFT in fp32 as PEFT in bf16 is, times `NOISE`."""
    folder = tiny.save_tiny_base(scratch / "bf16")
    ranks = (1, 4, 16, 64)
    made = [tiny.save_adapter(scratch / f"bf16-{rank}", folder, seed=rank, rank=rank) for rank in ranks]
    base = load_base(folder, device=card.device, dtype=torch.bfloat16, backend=card.backend(torch.bfloat16))
    tokens = [(11 * position + 5) % 250 for position in range(60)]
    ours = logprobs_together(base, tokens, [None, *(load_adapter(base, adapter) for adapter in made)])
    worst, noise = 0.0, LEAST_NOISE / NOISE
    for adapter, own in zip([None, *made], ours, strict=True):
        exact, half = (_oracle(card, folder, adapter, dtype) for dtype in (torch.float32, torch.bfloat16))
        expected = exact.logprobs(tokens)[-1]
        worst = max(worst, float((own - expected).abs().max()))
        noise = max(noise, float((half.logprobs(tokens)[-1] - expected).abs().max()))
    report.check(worst <= NOISE * noise, f"bf16: off by {worst:.2g} of a log-probability, PEFT's bf16 by {noise:.2g}")
    report.row("bf16 mixed step against PEFT in fp32", f"off by {worst:.3f}, PEFT's own bf16 by {noise:.3f}")
    return {"worst": worst, "noise": noise}


def _oracle(card: Card, base: Path, adapter: Path | None, dtype: torch.dtype) -> Oracle:
    oracle = Oracle(base, adapter, dtype)
    oracle.to(card.device)
    return oracle


def load_adapter(base: BaseModel, folder: Path) -> AdapterWeights:
    files = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    return base.prepared(load_weights(f"sha256:{folder.name}", *files, base.layers, base.dtype, base.device))


def logprobs_together(base: BaseModel, tokens: list[int], adapters: list[AdapterWeights | None]) -> list[Tensor]:
    """[vocab_size], on the CPU, of the token after `tokens` for each of `adapters`, all of them in one step."""
    pool, rows = BlockPool(256, 16), []
    for weights in adapters:
        uses = () if weights is None else (AdapterUse(weights, 1.0, weights.digest),)
        request = Request("check", tuple(tokens), SamplingParams(max_tokens=1), lambda _event: None, adapters=uses)
        sequence = Sequence(request, 0)
        pool.grow(sequence.block_table, sequence.num_tokens)
        rows.append(rows_of(sequence, 0, sequence.num_tokens))
    return list(base.runner(256, 16).logits(Batch(tuple(rows))).float().log_softmax(-1).cpu())


def ask_kinds(report: Report, card: Card, scratch: Path) -> dict[str, Any]:
    """Every kind over HTTP, in the same steps as all others, a sum and the base; every token against PEFT."""
    warnings.simplefilter("ignore")
    figures: dict[str, Any] = {}
    for name in ["llama"] if card.is_dry else peft_kinds.BASES:
        base = peft_kinds.save_base(name, scratch / f"http-{name}")
        made = list(kinds_table.make_all(name, base, scratch / f"http-{name}-adapters"))
        if card.is_dry:
            made = [each for each in made if each.kind in ("plain", "partner", "dora, patterns")]
        company = Company(base, made, max_tokens=8 if card.is_dry else 24)
        for member in company.members:
            member.oracle.to(card.device)
        with serving(_settings(card, base, scratch / f"http-{name}-data")) as server:
            company.upload(server)
            with gathered(server, len(company.members)) as steps:
                answers = asyncio.run(company.ask(server))
        wrong, unmoved = company.wrong(answers), company.unmoved(answers)
        report.check(not wrong, f"over HTTP, {name}: PEFT says otherwise to {sorted(wrong)}")
        report.check(unmoved == {BASE}, f"over HTTP, {name}: as the base answered {sorted(unmoved)}")
        figures[name] = {"members": len(company.members), "most in a step": steps.most, "wrong": sorted(wrong)}
    members = sum(told["members"] for told in figures.values())
    wrong_ones = sum(len(told["wrong"]) for told in figures.values())
    report.row("answers over HTTP that are PEFT's, fp32, mixed steps", f"{members - wrong_ones} of {members}")
    return figures


def _settings(card: Card, base: Path, data_dir: Path, **fields: Any) -> Settings:
    return settings(base, data_dir, device="cuda" if card.is_gpu else "cpu", **fields)


def isolate(report: Report, card: Card, scratch: Path) -> dict[str, Any]:
    """The proof that no request is answered with another's weights, under uploads, replaces, deletes and evictions."""
    workload = isolation_proof.Workload(3, 2, 24, 8) if card.is_dry else isolation_proof.Workload(100, 30, 300)
    with patch.object(isolation, "settings", partial(_settings, card)):
        found = isolation.prove(workload)
    for problem in found.problems:
        report.problem(f"isolation: {problem}")
    kinds = Counter(entry["event"] for entry in found.log)
    report.row(
        "answers that are what their digest says alone",
        f"{found.answers - len(found.problems)} of {found.answers}; {found.swaps} swaps, {found.replaces} replaces",
    )
    figures = {key: getattr(found, key) for key in ("swaps", "replaces", "loads", "freed", "answers", "tokens", "ties")}
    return figures | {"log": kinds, "closest": found.closest, "took": found.seconds}


def refuse_too_much(report: Report, card: Card, scratch: Path) -> dict[str, Any]:
    """A KV cache that asks for more memory than the card has is refused at start, by the setting's name."""
    base = tiny.save_tiny_base(scratch / "refused")
    free = device_memory.free_bytes(card.device)
    if free is None:
        return {}
    config = _settings(card, base, scratch / "refused-data", kv_cache_bytes=free + (1 << 30), block_size=1024)
    told = _refusal(Service(config))
    report.check("--kv-cache-bytes" in told, f"a KV cache beyond what is free is answered: {told}")
    report.row("a KV cache beyond what is free", "refused at start" if "--kv-cache-bytes" in told else "NOT refused")
    return {"told": told}


def _refusal(service: Service) -> str:
    try:
        service.start(lambda _message: None)
    except UnsupportedModelError as error:
        return str(error)
    finally:
        service.stop()
    return "served"


def outlive_memory(report: Report, card: Card, scratch: Path) -> dict[str, Any]:
    """An adapter for which the card has no memory is an error of its own request; the server goes on."""
    if not card.is_gpu:
        return {}
    base = tiny.save_tiny_base(scratch / "full")
    adapter = tiny.save_adapter(scratch / "full-adapter", base, seed=1)
    with serving(_settings(card, base, scratch / "full-data")) as server:
        server.put("one", adapter).raise_for_status()
        before = _said(server.generate(BASE, [1, 2, 3]))
        with _full_card(card):
            told = _said(server.generate("one", [1, 2, 3]))
        after, again = (_said(server.generate(name, [1, 2, 3])) for name in (BASE, "one"))
    report.check("memory_full" in told, f"an adapter that the full card has no memory for is answered: {told}")
    report.check(before == after, f"once the card was full, the base answers {after}, and not {before}")
    report.finding(f"an adapter, with the card's memory full: {told}; with room again: {again}")
    return {"full": told, "afterwards": again}


def _said(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["token_ids"]) if answer.status_code == 200 else answer.text


@contextmanager
def _full_card(card: Card) -> Iterator[None]:
    """All memory of the card is taken, down to what is smaller than any tensor of a step."""
    card.free()
    taken: list[Tensor] = []
    size = 1 << 34
    while size >= 512:
        try:
            taken.append(torch.empty(size, dtype=torch.uint8, device=card.device))
        except torch.OutOfMemoryError:
            size >>= 1
    try:
        yield
    finally:
        taken.clear()
        card.free()
