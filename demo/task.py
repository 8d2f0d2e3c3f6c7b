"""What a demo task is: examples to learn from, examples never seen in training, and how an answer is judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


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
    """A task and the settings its adapter is trained with.

    `train(n, seed)` gives `n` examples, `held_out()` always the same hundred. `is_correct(expected, answer)` judges an
    answer. `num_steps` optimizer steps of `batch_size` examples each see every training example once.
    """

    name: str
    title: str
    data: str
    train: Callable[[int, int], list[Example]]
    held_out: Callable[[], list[Example]]
    is_correct: Callable[[str, str], bool]
    accuracy_means: str
    target_modules: Sequence[str]
    rank: int
    num_steps: int
    batch_size: int = 8
    learning_rate: float = 2e-3
    max_tokens: int = 64
    seed: int = 7

    @property
    def alpha(self) -> int:
        """LoRA's alpha, twice the rank: a scale of two at any rank."""
        return 2 * self.rank


def is_same_text(expected: str, answer: str) -> bool:
    """True if the two are equal once runs of white space count as one space."""
    return expected.split() == answer.split()
