"""A training run by transformers' Trainer: steps, measurements, checkpoints, and going on from the last of these."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from swaplora_adapters.train.base_model import TrainingError
from swaplora_adapters.train.batches import Batch, collate
from swaplora_adapters.train.recipe import Recipe

WARMUP = 0.1  # of the steps
NUM_CHECKPOINTS, NUM_POINTS = 10, 100  # of a run: how many as a rule, and points of its curve at most
_STATE = "trainer_state.json"  # of a checkpoint, what is written last
Point = tuple[int, float]  # step, loss
Progress = Callable[[int, int, float | None, float | None], None]  # steps done, of how many, the last two losses


@dataclass(frozen=True, slots=True)
class History:
    """How a run went. `kept` is the step whose adapter is kept: the best on the hold-out, or the last without one."""

    num_steps: int
    planned: int
    learnt: Sequence[Point]
    held_out: Sequence[Point]
    kept: int

    @property
    def final_loss(self) -> float:
        """The mean over the last tenth of the steps."""
        last = [loss for step, loss in self.learnt if step > 0.9 * self.num_steps] or [self.learnt[-1][1]]
        return sum(last) / len(last)

    @property
    def held_out_at(self) -> dict[int, float]:
        """The loss on the hold-out by step; 0 is before any."""
        return dict(self.held_out)


def learn(
    model: Any,
    steps: Sequence[Batch],
    held_out: Sequence[Batch],
    recipe: Recipe,
    work: Path,
    progress: Progress,
    *,
    pad_id: int,
    only_learnt: bool,
) -> History:
    """Train `model` in place, from the last whole checkpoint in `work` if there is one; it has the kept weights then.

    Raises TrainingError when the loss is no number any more, and when the best checkpoint is not there any more.
    """
    work = work.resolve()  # the Trainer notes where checkpoints lie
    checkpoint = last_checkpoint(work)
    if checkpoint is not None and (history := _ended(checkpoint, len(steps))) is not None:
        model.load_adapter(str(work / f"checkpoint-{history.kept}"), "default", is_trainable=True)
        return history
    every = recipe.checkpoint_steps or max(1, math.ceil(len(steps) / NUM_CHECKPOINTS))
    is_measured = bool(held_out)
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=1,  # an item of the data is a batch already, and the steps are all in their order
        per_device_eval_batch_size=1,
        train_sampling_strategy="sequential",
        num_train_epochs=1,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(WARMUP, 1 - 1e-9) if len(steps) > 1 else 0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=max(1, len(steps) // NUM_POINTS),
        logging_nan_inf_filter=False,
        eval_strategy="steps" if is_measured else "no",
        eval_steps=every,
        eval_on_start=is_measured and checkpoint is None,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=is_measured,
        metric_for_best_model="eval_loss" if is_measured else None,
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        prediction_loss_only=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        seed=recipe.seed,
        use_cpu=model.device.type == "cpu",
        report_to="none",
        disable_tqdm=True,
    )
    # with several it would take as many batches for a step, and fewer steps; it has no argument for it
    arguments._n_gpu = min(arguments.n_gpu, 1)  # noqa: SLF001
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=steps,
        eval_dataset=held_out or None,
        data_collator=lambda items: collate([one for item in items for one in item], pad_id, only_learnt=only_learnt),
        callbacks=[
            _Reporter(progress, len(steps)),
            *([EarlyStoppingCallback(recipe.patience)] if is_measured and recipe.patience else []),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return _history(trainer.state, len(steps))


def last_checkpoint(work: Path) -> Path | None:
    """The last that is whole; those that a kill left in the middle are removed."""
    folders = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]), reverse=True)
    for folder in folders:
        if _is_whole(folder):
            return folder
        shutil.rmtree(folder)
    return None


def _is_whole(folder: Path) -> bool:
    try:
        return isinstance(json.loads((folder / _STATE).read_bytes()), dict)
    except (OSError, ValueError):
        return False


def _ended(checkpoint: Path, planned: int) -> History | None:
    """Of a run that had come to its end, early or not, at this checkpoint; the Trainer would go on with it."""
    state = TrainerState.load_from_json(str(checkpoint / _STATE))
    best = state.best_model_checkpoint
    if best is not None and not Path(best).is_dir():
        raise TrainingError(f"the best checkpoint is not in {best} any more: put it back, or begin anew")
    is_over = state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]
    return _history(state, planned) if is_over else None


def _history(state: Any, planned: int) -> History:
    learnt = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in state.log_history if "eval_loss" in entry]
    return History(state.global_step, planned, learnt, held_out, state.best_global_step or state.global_step)


class _Reporter(TrainerCallback):  # type: ignore[misc]
    """Tells how far it is, and ends what cannot become anything."""

    def __init__(self, progress: Progress, planned: int) -> None:
        self._progress = progress
        self._planned = planned
        self._losses: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Raises TrainingError where several devices or processes would share the steps."""
        if state.max_steps != self._planned:
            raise TrainingError(f"the Trainer would take {state.max_steps} steps in the place of {self._planned}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **others: Any) -> None:
        """Raises TrainingError."""
        self._losses |= {name: value for name, value in (logs or {}).items() if name in ("loss", "eval_loss")}
        if not all(map(math.isfinite, self._losses.values())):
            raise TrainingError(f"the loss is no number any more at step {state.global_step}: lower the learning rate")
        self._tell(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._tell(state)

    def _tell(self, state: Any) -> None:
        self._progress(state.global_step, state.max_steps, self._losses.get("loss"), self._losses.get("eval_loss"))
