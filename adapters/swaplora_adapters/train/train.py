"""`train`: from a base and a file of examples to an adapter's folder."""

import hashlib
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from swaplora_adapters.train import base_model, remarks, work
from swaplora_adapters.train.base_model import TrainingError
from swaplora_adapters.train.batches import in_order, steps_of
from swaplora_adapters.train.card import Origin, write_card
from swaplora_adapters.train.data import Data, Split, read_data, split, split_by_file
from swaplora_adapters.train.encode import Encoder, EncodingError, Limit, Tokens, encode_all
from swaplora_adapters.train.recipe import Recipe
from swaplora_adapters.train.remarks import Continued
from swaplora_adapters.train.run import History, Progress, learn

WORK_SUFFIX = ".training"
_ADAPTER = "adapter"  # beside the checkpoints
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
        out = self.out.resolve()
        return out.with_name(out.name + WORK_SUFFIX)


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
    task = replace(task, out=task.out.resolve())  # a link stays, and what it names is what the adapter's folder becomes
    done = work.result_of(task.work, task.out) if resume else None
    if done is None:
        work.require_place(task.out)
    data = read_data(task.data)
    others = None if recipe.holdout_share is not None else read_data(Path(recipe.holdout))
    parts = split(data, recipe.holdout_share or 0.0, recipe.seed) if others is None else split_by_file(data, others)
    facts = _facts(data, others, recipe)
    work.require(task.work, facts, resume=resume)
    origin = Origin(task.out.name, task.base_id, None, data, others, len(parts.learnt), len(parts.held_out))
    if done is not None:
        before, result = done
        work.clear(task.work)
        report(f"the adapter was in {task.out} already; nothing was left to do but to remove {task.work.name}")
        return Trained(History(**result["history"]), replace(origin, base_digest=before["base"]), result["remarks"])
    base = base_model.load_base(task.source, recipe, task.device)
    origin = replace(origin, base_digest=base_model.digest_of_base(task.source))  # a hub id has its files only now
    continued = None if recipe.init_from is None else _continued(recipe.init_from, base, task)
    tokenizer = AutoTokenizer.from_pretrained(task.source)
    learnt, held_out, num_cut = _encoded(tokenizer, base, recipe, data, others, parts)
    facts |= {"base": origin.base_digest, "tokens": _digest([learnt, held_out])}
    facts |= {"init_from": None if continued is None else continued.digest}
    said = [*remarks.on_data(data, parts, num_cut), *remarks.on_recipe(recipe)]
    said += [] if continued is None else remarks.on_start(continued)
    for remark in said:
        report(remark)
    model = base_model.with_adapter(base, recipe)
    with work.hold(task.work, facts, resume=resume):  # only now: a run that is refused leaves nothing behind
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
        write_card(folder, origin, recipe, history, said, continued, time.process_time() - started)
        work.end(task.work, folder, task.out, {"history": asdict(history), "remarks": said})
    return Trained(history, origin, said)


def _facts(data: Data, others: Data | None, recipe: Recipe) -> dict[str, Any]:
    """What a run hangs on and is known before the base is loaded, by the names of the flags."""
    held_out = {} if others is None else {"holdout": others.digest}
    return {"data": data.digest, **recipe.model_dump(mode="json", exclude={"init_from"}), **held_out}


def _digest(parts: Sequence[Sequence[Tokens]]) -> str:
    """Of every example's ids and of which are learnt: other files of the tokenizer make other ones."""
    whole = hashlib.sha256()
    for part in parts:
        for tokens in part:
            whole.update(f"{list(tokens.ids)} {list(tokens.is_learnt)}\n".encode())
        whole.update(b"\n")
    return f"sha256:{whole.hexdigest()}"


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
