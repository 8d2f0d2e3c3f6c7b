"""`make gpu-check`: is what `--device cuda` serves right on this card, and how fast is it?

Correctness comes first, then figures; everything goes into the JSON file of `--out` as it is found, and one table comes
last. Ends with 1 when anything is wrong. `--dry` runs a small form of all of it on the CPU, so that the script itself
can be tested; its figures mean nothing. `--only` runs sections by the beginning of their names. What is left after
nine minutes is named; `--from` goes on there, with what `--out` holds. It does so by itself, in a new process, after a
section with which the card stopped to compute in this one.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from gpu_checks import ablations, graphs, http, loads, operations, peers, quantised, rows, served, steps
from gpu_checks import card as card_checks
from gpu_checks.card import Card
from gpu_checks.models import random_base
from gpu_checks.report import Report
from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.base.base_model import BaseModel
from swaplora_server.kernels.device_fault import fault_of

Section = Callable[[Report], dict[str, Any]]
WIDTH = 150
BUDGET_SECONDS = 540


class Subject:
    """One random base and adapters for it, made when a section first asks."""

    def __init__(self, shape: str, card: Card, dtype: torch.dtype) -> None:
        self.name = shape if dtype == torch.bfloat16 else f"{shape} fp32"
        self._shape, self._card, self._dtype = shape, card, dtype

    @cached_property
    def base(self) -> BaseModel:
        return random_base(self._shape, self._card, self._dtype)

    @cached_property
    def adapters(self) -> list[AdapterWeights]:
        return steps.adapters_of(self.base, is_dry=self._card.is_dry)

    def close(self, _report: Report) -> dict[str, Any]:
        """Give the memory back."""
        vars(self).pop("base", None)
        vars(self).pop("adapters", None)
        self._card.free()
        return {}


def sections(card: Card, scratch: Path) -> dict[str, Section]:
    """In their order, by name."""
    shapes = ("tiny",) if card.is_dry else ("135M", "8B")
    exact = Subject(shapes[0], card, torch.float32)
    found: dict[str, Section] = {
        "lora": partial(operations.check_lora, card=card),
        "attention": partial(operations.check_attention, card=card),
        "rows": partial(rows.check_rows, card=card),
        "proof": partial(served.prove_architectures, card=card, scratch=scratch),
        "kinds": partial(served.compare_kinds, card=card, scratch=scratch),
        "bf16": partial(served.compare_bf16, card=card, scratch=scratch),
        "quantised": partial(quantised.compare_quantised, card=card, scratch=scratch),
        "http kinds": partial(served.ask_kinds, card=card, scratch=scratch),
        "isolation": partial(served.isolate, card=card, scratch=scratch),
        "bits fp32": lambda report: steps.compare_companies(report, card, exact.name, exact.base, exact.adapters),
        "end of fp32": exact.close,
    }
    for shape in shapes:
        found |= _figures(Subject(shape, card, torch.bfloat16), card, scratch)
    return found | {
        "refusals": partial(served.refuse_too_much, card=card, scratch=scratch),
        "full card": partial(served.outlive_memory, card=card, scratch=scratch),
        "ablations": partial(ablations.measure_ablations, card=card, shape=shapes[-1]),
        "peers": partial(peers.measure_peers, card=card, shape=shapes[-1]),
        "served": partial(http.measure_http, card=card, shape=shapes[0], scratch=scratch),
    }


def _figures(of: Subject, card: Card, scratch: Path) -> dict[str, Section]:
    """All that is measured on one base."""
    return {
        f"{of.name} memory": lambda report: loads.show_memory(report, card, of.name, of.base),
        f"{of.name} decode": lambda report: steps.measure_decode(report, card, of.name, of.base, of.adapters),
        f"{of.name} graphs": lambda report: graphs.measure_graphs(report, card, of.name, of.base),
        f"{of.name} prompts": lambda report: steps.measure_prefill(report, card, of.name, of.base, of.adapters[0]),
        f"{of.name} loads": lambda report: loads.measure_loads(report, card, of.name, of.base, scratch),
        f"{of.name} swaps": lambda report: loads.swap_adapters(report, card, of.name, of.base, scratch),
        f"{of.name} copies": lambda report: loads.count_copies(report, card, of.base, scratch / of.name),
        f"{of.name} waits": lambda report: steps.find_waits(report, card, of.base, of.adapters),
        f"{of.name} profile": lambda report: steps.profile_steps(report, card, of.name, of.base, of.adapters),
        f"{of.name} bits": lambda report: steps.compare_companies(report, card, of.name, of.base, of.adapters),
        f"{of.name} sampling": lambda report: steps.measure_sampling(report, card, of.name, of.base),
        f"end of {of.name}": of.close,
    }


def run(report: Report, *, is_dry: bool, only: tuple[str, ...] = (), first: str | None = None) -> str | None:
    """All sections, or those whose names begin as one of `only`, from `first` on, and the table.

    Returns which is next where the device computes nothing any more in this process. Raises ValueError for a `first`
    that is none of them.
    """
    device = torch.device("cpu" if is_dry else "cuda")
    card, measured = card_checks.measure(device, is_dry=is_dry)
    if first is None:
        report.figures["card"] = measured
        report.say(", ".join(f"{key} {value}" for key, value in measured.items()))
        card_checks.show(report, measured)
    following = None
    with tempfile.TemporaryDirectory() as scratch:
        found = sections(card, Path(scratch))
        names = [name for name in found if not only or name.startswith((*only, "end of"))]
        names = names[names.index(first) if first else 0 :]
        for number, name in enumerate(names):
            if time.monotonic() - report.began > BUDGET_SECONDS:
                report.problem(f"{', '.join(names[number:])} did not run: go on with --from '{name}'")
                break
            report.section(name, found[name])
            if fault := fault_of(device):
                report.problem(f"{name}: the device computes nothing after it: {fault}")
                following = next(iter(names[number + 1 :]), None)
                break
    report.write()
    report.show()
    return following


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="a small form on the CPU")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="where the JSON goes")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="of sections; repeatable")
    parser.add_argument("--from", dest="first", metavar="NAME", help="the first section: those before stand in --out")
    arguments = parser.parse_args()
    if not arguments.dry and not torch.cuda.is_available():
        sys.exit("no CUDA device was found: --dry runs a small form of all of it on the CPU")
    transformers.logging.disable_progress_bar()
    report = Report(arguments.out, Console(width=WIDTH, soft_wrap=True))
    if arguments.first is not None:
        report.go_on()
    only = [part for name in arguments.only for part in ("--only", name)]
    following = run(report, is_dry=arguments.dry, only=tuple(arguments.only), first=arguments.first)
    if following is not None:
        again = [__file__, "--out", str(arguments.out), *only, "--from", following]
        os.execv(sys.executable, [sys.executable, *again])
    sys.exit(bool(report.problems))


if __name__ == "__main__":
    main()
