"""The base's weights as its own files have them, one at a time: what serves is packed, and cannot be read back."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from swaplora_adapters.fit.base import LinearShape
from swaplora_adapters.fit.targets import OUTPUT_HEADS
from swaplora_adapters.weights.values import PIECE

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
_DTYPES = frozenset({"F32", "F16", "BF16"})


class BaseFiles:
    """Where each linear's weight lies in the safetensors files of a folder, or of a hub id that is in the cache.

    A linear that the files have under another name, quantised or fused, is not found: its weight is None.
    """

    def __init__(self, source: str | Path) -> None:
        """A source without safetensors files has no weights here."""
        self._files = _files_by_name(source)
        self._norms: dict[str, float | None] = {}

    @property
    def paths(self) -> Sequence[Path]:
        """The files, in the order of their names."""
        return sorted(set(self._files.values()))

    def weight(self, path: str, shape: LinearShape) -> Tensor | None:
        """[out, in], or as the file has it [in, out], in the file's own format."""
        name = self._name(path)
        if name is None:
            return None
        with safe_open(self._files[name], framework="pt") as file:
            part = file.get_slice(name)
            fits = sorted(part.get_shape()) == sorted(shape) and part.get_dtype() in _DTYPES
            return file.get_tensor(name) if fits else None

    def norm(self, path: str, shape: LinearShape) -> float | None:
        """The Frobenius norm of a weight, read once."""
        if path not in self._norms:
            weight = self.weight(path, shape)
            self._norms[path] = None if weight is None else _norm(weight)
        return self._norms[path]

    def _name(self, path: str) -> str | None:
        """The base's own prefix is missing in some files, and a tied head is its embedding."""
        candidates = [f"{path}.weight", f"{path.partition('.')[2]}.weight"]
        found = next((name for name in candidates if name in self._files), None)
        if found is None and path.rpartition(".")[2] in OUTPUT_HEADS:
            tied = [name for name in self._files if name.endswith(_EMBEDDINGS)]
            found = tied[0] if len(tied) == 1 else None
        return found


def _files_by_name(source: str | Path) -> dict[str, Path]:
    """The file of every tensor, by the index of a sharded model or the header of a single file."""
    index, single = _cached(source, _INDEX), _cached(source, _SINGLE)
    if index is not None:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return {name: index.with_name(file) for name, file in weight_map.items()}
    if single is None:
        return {}
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def _cached(source: str | Path, name: str) -> Path | None:
    """A file of the base if it is on this machine."""
    found = cached_file(source, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _norm(weight: Tensor) -> float:
    """Summed in pieces that torch keeps on the calling thread, so that the other cores are not held up."""
    return float(sum(piece.double().square().sum() for piece in _pieces(weight)) ** 0.5)


def _pieces(weight: Tensor) -> Iterator[Tensor]:
    yield from torch.split(weight.reshape(-1), PIECE)
