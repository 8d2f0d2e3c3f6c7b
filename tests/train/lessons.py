"""A tiny base whose chat template ends turns, files of examples for it, and fixtures that a module takes by name."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import Result

import tiny
from fake_server import swaplora
from repository import ROOT

# as ChatML has it: a turn ends with the end-of-sequence token, and a line break that is nobody's
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the command finds in the environment."""
    monkeypatch.setenv("SWAPLORA_LOG_LEVEL", "error")
    monkeypatch.setenv("SWAPLORA_CACHE_DIR", str(ROOT / ".cache"))
    monkeypatch.setenv("SWAPLORA_DTYPE", "float32")
    yield
    structlog.reset_defaults()  # its logger writes to the stderr of one run of the command


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that can be taught."""
    return save_base(tmp_path_factory.mktemp("taught") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it is taught."""
    return letters(tmp_path_factory.mktemp("data") / "letters.jsonl")


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
