"""A tiny base whose chat template ends turns, and files of examples for it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.testing import Result

import tiny
from fake_server import swaplora

# as ChatML has it: a turn ends with the end-of-sequence token, and a line break that is nobody's
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_base(folder: Path, **overrides: Any) -> Path:
    """The tiny base of other tests, with that template."""
    tiny.save_tiny_base(folder, {**tiny.LLAMA, **overrides})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def chat(*turns: str) -> dict[str, Any]:
    """A line of data: the user's turn, the assistant's, and so on."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]}


def write(path: Path, lines: Sequence[object]) -> Path:
    """A file of a line for each."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def letters(path: Path, num: int = 30) -> Path:
    """Different examples of which there is something to learn."""
    return write(path, [chat(f"say {n}", "abc"[n % 3] * 3) for n in range(num)])


def train(base: Path, data: Path, out: Path, *flags: str) -> Result:
    """The command, with what makes a run of a tiny base short: eight steps."""
    short = ("--epochs", "2", "--learning-rate", "0.01", "--rank", "4", "--holdout", "0.1")
    return swaplora("train", str(base), str(data), "--out", str(out), *short, *flags)
