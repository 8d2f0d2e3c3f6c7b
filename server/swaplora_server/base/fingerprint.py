"""What a base computes with, as a hash: all bits of its weights, its configuration, tokenizer and chat template."""

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from swaplora_server.version import VERSION

_PROGRAMS = ("torch", "transformers", "tokenizers")
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_PLACES = frozenset({"_name_or_path", "transformers_version"})  # where it lies, and who wrote it


def digest_of(value: object) -> str:
    """Of a JSON value; what is none counts as its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def programs() -> dict[str, str]:
    """The versions of what computes."""
    return {"swaplora": VERSION, **{name: version(name) for name in _PROGRAMS}}


class Fingerprint(NamedTuple):
    """Hashes of what a base computes and reads with."""

    weights: str
    reading: str  # configuration, tokenizer and chat template, as the libraries here understand them


def fingerprint_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Fingerprint:
    """The same for the same base wherever it lies; another, as good as surely, for one of which any bit differs."""
    sha256 = hashlib.sha256()
    for name, tensor in _tensors(model):
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha256.update(_row_sums(tensor))
    configs = [{} if c is None else c.to_dict() for c in (model.config, getattr(model, "generation_config", None))]
    told = [{key: known[key] for key in known.keys() - _PLACES} for known in configs]
    reading = digest_of([*told, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template])
    return Fingerprint(sha256.hexdigest(), reading)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _row_sums(tensor: Tensor) -> bytes:
    """The bits of each row as whole numbers, added modulo 2**64 where they lie: as fast as they can be read."""
    raw = tensor.detach().contiguous()
    rows = raw.reshape(raw.shape[0] if raw.dim() > 1 else 1, -1).view(torch.uint8)
    word = next(word for word in _WORDS if rows.shape[1] % word.itemsize == 0)
    sums = rows.view(word).sum(-1, dtype=torch.int64)
    return sums.cpu().numpy().tobytes()
