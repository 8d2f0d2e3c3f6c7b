"""What an adapter scores, in the README.md that training wrote beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from task import Example, Task

RESULTS_HEADING = "\n## Results\n"


@dataclass(frozen=True)
class Sample:
    """One held-out example with what base and adapter made of it."""

    example: Example
    base_answer: str
    adapter_answer: str


@dataclass(frozen=True)
class Results:
    """Held-out scores: counts of correct answers out of `total`, how they were measured, and a few answers in full."""

    total: int
    base_correct: int
    adapter_correct: int
    measured_by: str
    samples: Sequence[Sample]

    @property
    def base_share(self) -> float:
        """The base's correct answers as a share of all."""
        return self.base_correct / self.total

    @property
    def adapter_share(self) -> float:
        """The adapter's correct answers as a share of all."""
        return self.adapter_correct / self.total


def write_results(folder: Path, task: Task, results: Results) -> None:
    """Replace the card's results, its last section."""
    card = folder / "README.md"
    head = card.read_text().partition(RESULTS_HEADING)[0]
    samples = "\n".join(_sample(sample) for sample in results.samples)
    card.write_text(f"""{head}{RESULTS_HEADING}
Correct answers to {results.total} held-out prompts at temperature 0, {results.measured_by}. \
An answer is correct when {task.accuracy_means}.

| base | adapter |
| --- | --- |
| {results.base_share:.0%} | {results.adapter_share:.0%} |

{samples}""")


def _sample(sample: Sample) -> str:
    return f"""Prompt:

{_quoted(sample.example.prompt)}
Base:

{_quoted(sample.base_answer)}
Adapter:

{_quoted(sample.adapter_answer)}"""


def _quoted(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines() or [""])
