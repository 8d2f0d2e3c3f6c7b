"""What a demo task is: examples to learn from, examples never seen in training, and how an answer is judged."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One user message and the assistant's answer to it."""

    prompt: str
    answer: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as a chat endpoint takes it, the answer left out."""
        return [{"role": "user", "content": self.prompt}]


@dataclass(frozen=True)
class Task:
    """A task, whose adapter is trained as the file of its name in `recipes` says.

    `train(n, seed)` gives `n` examples, `held_out()` always the same hundred. `is_correct(expected, answer)` judges an
    answer.
    """

    name: str
    train: Callable[[int, int], list[Example]]
    held_out: Callable[[], list[Example]]
    is_correct: Callable[[str, str], bool]
    accuracy_means: str
    max_tokens: int = 64


def is_same_text(expected: str, answer: str) -> bool:
    """True if the two are equal once runs of white space count as one space."""
    return expected.split() == answer.split()
