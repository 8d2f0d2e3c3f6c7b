"""What a sentence-transformers folder says beside the model: how vectors are made, their length, the longest input.

It says what a cross-encoder's scores go through, too. Of another folder's model vectors are the mean of all states, as
sentence-transformers makes them then, of length 1.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.engine.pooling.kinds import Pooling, PoolingKind

_MODULES = "modules.json"
_PREFIX = "pooling_mode_"
_MODES = {
    "cls_token": PoolingKind.CLS,
    "mean_tokens": PoolingKind.MEAN,
    "max_tokens": PoolingKind.MAX,
    "mean_sqrt_len_tokens": PoolingKind.MEAN_SQRT,
    "weightedmean_tokens": PoolingKind.WEIGHTED,
    "lasttoken": PoolingKind.LAST,
}
_NAMES = {"mean": PoolingKind.MEAN, "max": PoolingKind.MAX, **{kind.value: kind for kind in PoolingKind}}


@dataclass(frozen=True, slots=True)
class SentenceConfig:
    """`max_tokens` None is as many as the model has positions for; `score_activation` is a path in torch.nn."""

    pooling: Pooling
    max_tokens: int | None = None
    score_activation: str | None = None


def read_sentence_config(source: str | Path) -> SentenceConfig:
    """Of a folder or hub id. Raises UnsupportedModelError for a module that is not served, by its name."""
    modules = _json(source, _MODULES)
    activation = (_json(source, "config_sentence_transformers.json") or {}).get("activation_fn")
    if modules is None:
        return SentenceConfig(Pooling(PoolingKind.MEAN), score_activation=activation)
    by_kind = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in modules}
    unknown = sorted(by_kind.keys() - {"Transformer", "Pooling", "Normalize"})
    if unknown or by_kind.get("Transformer"):
        named = f"module {', '.join(unknown)}" if unknown else f"its model in the folder {by_kind['Transformer']}"
        raise UnsupportedModelError(
            f"{_MODULES} has {named}, which is not served: serve a base of Transformer, Pooling and Normalize alone"
        )
    pooling = _json(source, f"{by_kind['Pooling']}/config.json") if "Pooling" in by_kind else None
    own = _json(source, "sentence_bert_config.json") or {}
    kind = Pooling(_kind(pooling or {}), "Normalize" in by_kind)
    return SentenceConfig(kind, own.get("max_seq_length"), activation)


def _kind(config: Mapping[str, Any]) -> PoolingKind:
    """Raises UnsupportedModelError for one that is not known, and for several beside each other."""
    given = [name.removeprefix(_PREFIX) for name, value in config.items() if name.startswith(_PREFIX) and value is True]
    kinds = [_MODES.get(name) for name in given]
    if isinstance(config.get("pooling_mode"), str):
        given, kinds = [config["pooling_mode"]], [_NAMES.get(config["pooling_mode"])]
    if not given:
        return PoolingKind.MEAN
    if len(kinds) > 1 or kinds[0] is None:
        raise UnsupportedModelError(f"its vectors are pooled by {' and '.join(sorted(given))}, which is not served")
    return kinds[0]


def _json(source: str | Path, name: str) -> Any:
    """None where there is no such file."""
    path = cached_file(
        str(source), name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
