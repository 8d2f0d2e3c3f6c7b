"""`train`: from a base and a file of examples to an adapter's folder."""

import inspect
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from swaplora_adapters.derive.whole_models.new_folder import require_new
from swaplora_adapters.train import base_model, remarks
from swaplora_adapters.train.base_model import TrainingError
from swaplora_adapters.train.batches import in_order, steps_of
from swaplora_adapters.train.card import Origin, write_card
from swaplora_adapters.train.data import Data, Split, read_data, split, split_by_file
from swaplora_adapters.train.encode import Encoder, EncodingError, Limit, encode_all
from swaplora_adapters.train.recipe import Recipe
from swaplora_adapters.train.remarks import Continued
from swaplora_adapters.train.run import History, Progress, learn

WORK_SUFFIX = ".training"
_RUN_FILE, _ADAPTER = "run.json", "adapter"  # beside the checkpoints
_UNBOUNDED = 1 << 20  # tokens: of a base that says no context, or says a number that stands for none
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "seq_length")


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained on what, and where the adapter is written."""

    source: str | Path  # of the base, as transformers loads it
    base_id: str
    data: Path
    out: Path
    device: torch.device

    @property
    def work(self) -> Path:
        """Where the checkpoints are until the adapter is there."""
        return self.out.with_name(self.out.name + WORK_SUFFIX)


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of a run."""

    history: History
    origin: Origin
    remarks: Sequence[str]


def train(
    task: Task, recipe: Recipe, *, resume: bool = False, report: Callable[[str], None], progress: Progress
) -> Trained:
    """Train an adapter and write its folder, which appears once it is complete. `report` hears remarks at once.

    Until then checkpoints lie beside it: after a kill, `resume` goes on from the last of them, and comes to the same.
    Raises FileExistsError, OSError, DataError for the examples, InvalidAdapterError for the adapter to go on from, and
    TrainingError.
    """
    started = time.process_time()
    require_new(task.out)
    data = read_data(task.data)
    others = None if recipe.holdout_share is not None else read_data(Path(recipe.holdout))
    parts = split(data, recipe.holdout_share or 0.0, recipe.seed) if others is None else split_by_file(data, others)
    base_digest = base_model.digest_of_base(task.source)
    facts = _facts(base_digest, data, others, recipe)
    _check_begun(task, facts, resume=resume)
    base = base_model.load_base(task.source, recipe, task.device)
    continued = None if recipe.init_from is None else _continued(recipe.init_from, base, task)
    tokenizer = AutoTokenizer.from_pretrained(task.source)
    learnt, held_out, num_cut = _encoded(tokenizer, base, recipe, data, others, parts)
    said = [*remarks.on_data(data, parts, num_cut), *remarks.on_recipe(recipe)]
    said += [] if continued is None else remarks.on_start(continued)
    for remark in said:
        report(remark)
    model = base_model.with_adapter(base, recipe)
    if not resume:  # only now: a run that is refused leaves nothing behind
        task.work.mkdir(parents=True)
        (task.work / _RUN_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    history = learn(
        model,
        steps_of(learnt, recipe.batch_size, recipe.epochs, recipe.seed),
        in_order(held_out, recipe.batch_size),
        recipe,
        task.work,
        progress,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        only_learnt="logits_to_keep" in inspect.signature(base.forward).parameters,
    )
    folder = task.work / _ADAPTER
    base_model.save_adapter(model, folder, task.source, task.base_id)
    if continued is not None and continued.intruders_before is not None:
        after = base_model.num_intruders(folder, model.unload(), task.source)
        continued = replace(continued, intruders_after=after)
    for remark in remarks.on_result(history, continued):
        report(remark)
        said.append(remark)
    origin = Origin(task.out.name, task.base_id, base_digest, data, others, len(parts.learnt), len(parts.held_out))
    write_card(folder, origin, recipe, history, said, continued, time.process_time() - started)
    folder.rename(task.out)
    shutil.rmtree(task.work)
    return Trained(history, origin, said)


def _facts(base_digest: str | None, data: Data, others: Data | None, recipe: Recipe) -> dict[str, Any]:
    """All that a run hangs on, by the names of the flags."""
    held_out = {} if others is None else {"holdout": others.digest}
    return {"base": base_digest, "data": data.digest, **recipe.model_dump(mode="json"), **held_out}


def _check_begun(task: Task, facts: dict[str, Any], *, resume: bool) -> None:
    """Raise unless there is a run of the same to go on with, or none where none is to be gone on with."""
    if not resume:
        if task.work.exists():
            raise FileExistsError(f"{task.work} is there, of a run that did not end: go on with --resume, or remove it")
        return
    file = task.work / _RUN_FILE
    if not file.is_file():
        raise TrainingError(f"{task.work} has no run to go on with: leave --resume out")
    before = json.loads(file.read_bytes())
    if others := sorted(name for name in facts.keys() | before.keys() if facts.get(name) != before.get(name)):
        raise TrainingError(
            f"{', '.join(others)}: not as in the run to go on with; give the same, or leave --resume out"
        )


def _continued(folder: Path, base: Any, task: Task) -> Continued:
    details = base_model.check_continued(folder, base, task.base_id)
    return Continued(details.digest, details.warnings, base_model.num_intruders(folder, base, task.source))


def _encoded(
    tokenizer: Any, base: Any, recipe: Recipe, data: Data, others: Data | None, parts: Split
) -> tuple[list[Any], list[Any], int]:
    """The tokens that are learnt, those that are held out, and how many examples were cut."""
    configured = getattr(base.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    try:
        encoder = Encoder(tokenizer, {token for token in ids if token is not None})
    except EncodingError as error:
        raise TrainingError(str(error)) from error
    context = next((n for name in _CONTEXT_FIELDS if (n := getattr(base.config, name, None))), _UNBOUNDED)
    if recipe.max_tokens is not None and recipe.max_tokens > context:
        raise TrainingError(f"max_tokens: the base's context has {context} tokens, which {recipe.max_tokens} is beyond")
    limit = Limit(recipe.max_tokens or context, recipe.too_long == "truncate")
    learnt, num_cut = encode_all(encoder, data, parts.learnt, limit)
    held_out, num_cut_of_others = encode_all(encoder, others or data, parts.held_out, limit)
    return learnt, held_out, num_cut + num_cut_of_others
