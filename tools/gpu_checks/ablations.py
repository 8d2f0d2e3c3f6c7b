"""A recorded step without one of the things that make it fast: what each of them is worth."""

from statistics import median
from typing import Any

import torch

from gpu_checks.card import Card
from gpu_checks.models import prompt, random_adapter, random_base
from gpu_checks.report import Report
from gpu_checks.steps import CONTEXT, NUM_TIMED, stepper_for


class Without:
    """A backend that is another but for some of its attributes."""

    def __init__(self, backend: Any, **instead: Any) -> None:
        self._backend = backend
        vars(self).update(instead)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def measure_ablations(report: Report, card: Card, shape: str) -> dict[str, Any]:
    """Milliseconds of a step of as many adapters as rows, each variant on a base of its own."""
    backend = card.backend(torch.bfloat16)
    unfused: dict[str, Any] = {"wrap": lambda _model, _running: None}
    variants: dict[str, Any] = {
        "all of it": backend,
        "layers by single operations": Without(backend, **unfused),
        "and linears each by itself": Without(backend, **unfused, joins=False),
    }
    num_rows, context = (3, 40) if card.is_dry else (16, CONTEXT)
    figures = {}
    for label, chosen in variants.items():
        base = random_base(shape, card, torch.bfloat16, chosen)
        stepper = stepper_for(base, num_rows, context)
        for row in range(num_rows):
            stepper.add(prompt(row, context, base.vocab_size), [random_adapter(base, row)])
        stepper.decode()
        for form in ("launched", "recorded"):
            if form == "launched" or stepper.record(num_rows):
                stepper.times(2)
                figures[f"{label}, {form}"] = stepper.times(2 if card.is_dry else NUM_TIMED)
        del base, stepper
        card.free()
    for label, times in figures.items():
        report.row(f"{shape} step of {num_rows} rows and adapters, {label}", f"{median(times) * 1e3:.2f} ms")
    return figures
