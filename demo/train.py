"""Train the demo adapters with PEFT: `python demo/train.py [NAME...]`, all of them when none is named.

One recipe for all: AdamW, a short warm-up and a linear decay, loss on the answer's tokens only, prompts rendered by the
base's own chat template. Each adapter's folder gets the two PEFT files and a card.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import torch
import typer
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from cards import Training, write_card
from swaplora_server.embedded import ensure_embedded_base
from task import Example, Task
from tasks import TASKS

BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER = Path(__file__).parent
CACHE_DIR = Path("~/.cache/swaplora").expanduser()
IGNORED = -100
WARMUP_SHARE = 0.1
REPORT_EVERY = 20


class HasLength(Protocol):
    """Something to learn from."""

    @property
    def length(self) -> int:
        """Number of tokens in all."""


Learnt = TypeVar("Learnt", bound=HasLength)


@dataclass(frozen=True)
class Encoded:
    """Token ids of a rendered prompt and of the answer with its end-of-turn token."""

    prompt: list[int]
    answer: list[int]

    @property
    def length(self) -> int:
        """Number of tokens in all."""
        return len(self.prompt) + len(self.answer)


def encode(tokenizer: Any, example: Example) -> Encoded:
    """Tokenize as a chat endpoint does, prompt and answer apart, so that training sees the prompt's exact tokens."""
    prompt = tokenizer.apply_chat_template(example.messages, add_generation_prompt=True)["input_ids"]
    answer = tokenizer(example.answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return Encoded(prompt, answer)


def make_batches(examples: list[Learnt], batch_size: int, seed: int) -> list[list[Learnt]]:
    """Batches of like length, which need little padding, in random order."""
    ordered = sorted(examples, key=lambda example: example.length)
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    random.Random(seed).shuffle(batches)
    return batches


def pad_left(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    """Rows of ids as one tensor [len(rows), longest], filled on the left."""
    longest = max(map(len, rows))
    return torch.tensor([[value] * (longest - len(row)) + row for row in rows])


def batch_loss(model: Any, batch: Sequence[Encoded], pad_id: int) -> torch.Tensor:
    """Mean cross entropy of the answers' tokens; with padding on the left only the last logits need computing."""
    longest_answer = max(len(example.answer) for example in batch)
    logits = model(
        input_ids=pad_left([example.prompt + example.answer for example in batch], pad_id),
        attention_mask=pad_left([[1] * example.length for example in batch], 0),
        logits_to_keep=longest_answer + 1,
    ).logits[:, :-1]  # [len(batch), longest_answer, vocab]
    return cross_entropy(logits.flatten(0, 1), pad_left([example.answer for example in batch], IGNORED).flatten())


def fit(
    model: Any,
    batches: Sequence[Sequence[Learnt]],
    learning_rate: float,
    pad_id: int,
    loss_of: Callable[[Any, Sequence[Learnt], int], torch.Tensor],
) -> float:
    """One optimizer step a batch. Returns the mean loss of the last steps."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    warmup = max(1, round(WARMUP_SHARE * len(batches)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (len(batches) - step) / (len(batches) - warmup + 1))
    )
    losses: list[float] = []
    for step, batch in enumerate(batches, start=1):
        loss = loss_of(model, batch, pad_id)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, max_norm=1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % REPORT_EVERY == 0:
            typer.echo(f"  step {step}/{len(batches)}: loss {_recent(losses):.3f}")
    return _recent(losses)


def _recent(losses: Sequence[float]) -> float:
    recent = losses[-REPORT_EVERY:]
    return sum(recent) / len(recent)


def save(model: Any, folder: Path) -> None:
    """Write the adapter in bf16, naming its base by id instead of the path it was read from."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = BASE_ID
    model.save_pretrained(folder, save_embedding_layers=False)


def train(task: Task, base: Path) -> None:
    """Train one adapter from its seed and write its folder."""
    typer.echo(f"{task.name}: {task.num_steps} steps of {task.batch_size}")
    started = time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(base)
    examples = [encode(tokenizer, example) for example in task.train(task.num_steps * task.batch_size, task.seed)]
    torch.manual_seed(task.seed)
    config = LoraConfig(
        r=task.rank, lora_alpha=task.alpha, target_modules=list(task.target_modules), task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    model.train()
    batches = make_batches(examples, task.batch_size, task.seed)
    loss = fit(model, batches, task.learning_rate, tokenizer.pad_token_id, batch_loss)
    save(model, FOLDER / task.name)
    cpu_seconds = time.process_time() - started
    write_card(FOLDER / task.name, task, Training(BASE_ID, cpu_seconds, loss))
    typer.echo(f"  {cpu_seconds / 60:.1f} CPU minutes, loss {loss:.3f}")


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Adapters to train; all when none is named.")] = None,
    cache_dir: Annotated[
        Path, typer.Option(envvar="SWAPLORA_CACHE_DIR", help="Where the base is unpacked.")
    ] = CACHE_DIR,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Train demo adapters on the embedded base."""
    unknown = sorted(set(names or ()) - TASKS.keys())
    if unknown:
        raise typer.BadParameter(f"no task named {', '.join(unknown)}; there are {', '.join(TASKS)}")
    torch.set_num_threads(threads)
    folder = ensure_embedded_base(cache_dir, typer.echo)
    for name in names or TASKS:
        train(TASKS[name], folder)


if __name__ == "__main__":
    typer.run(main)
