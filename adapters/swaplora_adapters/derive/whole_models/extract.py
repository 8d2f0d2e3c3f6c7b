"""An adapter of a full fine-tune: what it changed in each linear, cut down to its largest singular directions."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from swaplora_adapters.derive.lowrank import Limit, LowRank, cut_matrix
from swaplora_adapters.derive.whole_models.new_folder import new_folder, require_new
from swaplora_adapters.derive.write import write_adapter

# of a model's config: what does not change how a token is computed, or shows in the weights that are compared
_HARMLESS = frozenset(
    {"_name_or_path", "architectures", "dtype", "tie_word_embeddings", "transformers_version", "use_cache"}
)
_SPECIAL_TOKEN = "_token_id"

Progress = Callable[[str, int, int], None]  # a module's path, how many were done before it, of how many


class NotLowRankError(ValueError):
    """A fine-tune that no adapter of this base can stand for; `reasons` name each part."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


@dataclass(frozen=True, slots=True)
class Extraction:
    """What an adapter holds of a fine-tune, and what it does not."""

    modules: Mapping[str, LowRank]  # by the linears' paths
    left_out: Mapping[str, float]  # parameter → ‖tuned - base‖ / ‖base‖, of those that were to be left out
    other_tokens: Sequence[str]  # fields of the config that name special tokens, and are others in the fine-tune


def extract_adapter(
    base: str | Path,
    tuned: Path,
    out: Path,
    limit: Limit,
    leave_out: Sequence[str] = (),
    *,
    base_model: str | None = None,
    progress: Progress = lambda path, done, total: None,
) -> Extraction:
    """Write an adapter of `base` into `out` that makes it answer as the model in `tuned`, as near as `limit` lets it.

    An adapter changes linears: whatever else differs is an error, unless its name matches one of the patterns in
    `leave_out`, in which `*` stands for any text.

    Raises NotLowRankError for such differences, for a config that computes otherwise, for weights that are not finite
    and for two models that are the same, ValueError and OSError for a model that cannot be loaded, AdapterTooLargeError
    and FileExistsError.
    """
    require_new(out)
    models = [_loaded(base), _loaded(tuned)]
    other_tokens = _other_tokens(*models)
    names = _different(*models)
    linears = {f"{path}.weight": m for path, m in models[0].named_modules() if isinstance(m, nn.Linear | Conv1D)}
    skipped = [name for name in names if any(fnmatchcase(name, pattern) for pattern in leave_out)]
    kept = [name for name in names if name not in skipped]
    if others := [name for name in kept if name not in linears]:
        words = "differs and is no weight of a linear: leave it out by name, or fine-tune without it"
        raise NotLowRankError([f"{name} {words}" for name in others])
    if not kept:
        raise NotLowRankError(["no linear of the fine-tune differs from the base's"])
    before, after = (model.state_dict() for model in models)
    modules = {}
    for number, name in enumerate(kept):
        path = name.removesuffix(".weight")
        progress(path, number, len(kept))
        delta = after[name].float() - before[name].float()
        modules[path] = cut_matrix(delta.T if isinstance(linears[name], Conv1D) else delta, limit)
    with new_folder(out) as folder:
        transposed = any(isinstance(linears[name], Conv1D) for name in kept)
        write_adapter(folder, modules, base_model=base_model, fan_in_fan_out=transposed, max_bytes=sys.maxsize)
    return Extraction(modules, {name: _relative(after[name], before[name]) for name in skipped}, other_tokens)


def holding(energy: float, most: int) -> Limit:
    """As many singular values as hold this share of the sum of their squares, in (0, 1], and at most `most`."""

    def limit(values: Tensor) -> int:
        held = values.double().square().cumsum(0)
        return min(most, int((held < energy * held[-1]).sum()) + 1, len(values))

    return limit


def _loaded(source: str | Path) -> PreTrainedModel:
    """Raises NotLowRankError for files that lack weights, which would be drawn at random, or have others."""
    model, info = AutoModelForCausalLM.from_pretrained(source, dtype="auto", output_loading_info=True)
    kinds = {"missing_keys": "is not in its files", "unexpected_keys": "is in its files and in no part of the model"}
    if reasons := [f"{key} {words}" for kind, words in kinds.items() for key in sorted(info[kind])]:
        raise NotLowRankError(reasons)
    loaded: PreTrainedModel = model
    return loaded


def _other_tokens(base: PreTrainedModel, tuned: PreTrainedModel) -> list[str]:
    """Raises NotLowRankError for any other field that differs."""
    ours, theirs = base.config.to_dict(), tuned.config.to_dict()
    names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    tokens = [name for name in names if name.endswith(_SPECIAL_TOKEN)]
    if others := [name for name in names if name not in _HARMLESS and name not in tokens]:
        raise NotLowRankError([f"{name} in its config.json is not the base's" for name in others])
    return tokens


def _different(base: PreTrainedModel, tuned: PreTrainedModel) -> list[str]:
    """The parameters and buffers that differ, by name. One that both models tie to another is not named again.

    Raises NotLowRankError for those that only one of them has, that have another shape, or numbers that are not finite.
    """
    before, after = base.state_dict(), tuned.state_dict()
    reasons = [f"only one of the two models has {name}" for name in sorted(before.keys() ^ after.keys())]
    own = {name for model in (base, tuned) for name, _ in (*model.named_parameters(), *model.named_buffers())}
    names = [name for name in before if name in after and name in own]
    for name in names:
        if before[name].shape != after[name].shape:
            shapes = " and ".join(str(list(tensor.shape)) for tensor in (after[name], before[name]))
            reasons.append(f"{name} has other sizes than the base's: {shapes}")
        elif not after[name].isfinite().all():
            reasons.append(f"{name} has numbers that are not finite")
    if reasons:
        raise NotLowRankError(reasons)
    return [name for name in names if not torch.equal(before[name].float(), after[name].float())]


def _relative(after: Tensor, before: Tensor) -> float:
    whole = before.double().norm()
    return float((after.double() - before.double()).norm() / whole) if whole else float("inf")
