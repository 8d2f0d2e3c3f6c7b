"""The README.md beside each adapter: what it learnt and how, from training; what it scores, from measuring."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from task import Example, Task

RESULTS_HEADING = "\n## Results\n"
NOT_MEASURED = "Not measured since the last training: run `python demo/evaluate.py --write-cards`.\n"


@dataclass(frozen=True)
class Training:
    """How a training run went: seconds of CPU time over all threads, and the mean loss of its last steps."""

    base_id: str
    cpu_seconds: float
    loss: float


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


def write_card(folder: Path, task: Task, training: Training) -> None:
    """Write a fresh card whose results are still to be measured."""
    modules = ", ".join(task.target_modules)
    (folder / "README.md").write_text(f"""---
base_model: {training.base_id}
library_name: peft
license: apache-2.0
pipeline_tag: text-generation
tags: [lora, {task.name}]
---
# {task.name}: {task.title}

A LoRA adapter for {training.base_id}. Ask it with one user message and no system message.

- **Data**: {task.data} No text from elsewhere.
- **Licence**: Apache-2.0, adapter and data.
- **Adapter**: rank {task.rank}, alpha {task.alpha}, on {modules}; bf16.
- **Recipe**: `python demo/train.py {task.name}`; {task.num_steps} AdamW steps of {task.batch_size} examples, \
learning rate {task.learning_rate:g} with warm-up and linear decay, loss on the answer's tokens only, fp32, \
seed {task.seed} for data, order and weights.
- **Training**: {training.cpu_seconds / 60:.1f} CPU minutes, two threads, final loss {training.loss:.3f}.
{RESULTS_HEADING}
{NOT_MEASURED}""")


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
