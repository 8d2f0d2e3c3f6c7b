"""Adapters made of stored or of uploaded ones, for the registry to publish: files into a staging folder, and how."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from swaplora_adapters.cancellation import Cancellation
from swaplora_adapters.config.parse import MAX_CONFIG_BYTES
from swaplora_adapters.derive.convertible import read_convertible
from swaplora_adapters.derive.process import DerivationProcess
from swaplora_adapters.derive.recipe import Recipe
from swaplora_adapters.files.disk import open_regular, read_bounded
from swaplora_adapters.fit.base import LinearShape
from swaplora_adapters.store.records import VersionRecord
from swaplora_adapters.store.staging import FILE_NAMES, Staging

DEFAULT_ENERGY = 0.99  # of a conversion: at most a tenth of the delta's norm is lost
_CHUNK_BYTES = 1 << 20


class StoredIngredient(NamedTuple):
    """A version to be combined with others, a folder with its two files, and how much of it."""

    record: VersionRecord
    folder: Path
    scale: float


@dataclass(frozen=True, slots=True)
class Deriver:
    """Makes adapters for one base. Each method writes the two files and returns the version's provenance, JSON.

    WorkCancelledError when the work is cancelled, so that nothing is published.
    """

    process: DerivationProcess
    shapes: Mapping[str, LinearShape]
    base_model: str
    max_bytes: int  # of a weights file

    def compose(
        self,
        ingredients: Sequence[StoredIngredient],
        recipe: Recipe,
        cancellation: Cancellation,
        staging: Staging,
        *,
        materialise: bool,
    ) -> str:
        """Combine `ingredients`. One adapter as it is stays what it is, byte for byte. Raises like `compose.compose`.

        `materialise`: have it served merged into weights of its own.
        """
        made: Mapping[str, Any] = {}
        if recipe.method == "sum" and [ingredient.scale for ingredient in ingredients] == [1.0]:
            _copy(ingredients[0].folder, staging)
        else:
            folders = [str(ingredient.folder) for ingredient in ingredients]
            scales = [ingredient.scale for ingredient in ingredients]
            arguments = {"folders": folders, "scales": scales, "recipe": recipe.told(), "out": str(staging.path)}
            made = self._run("compose", arguments, cancellation)
        listed = [
            {"name": i.record.name, "version": i.record.version, "digest": i.record.digest, "scale": i.scale}
            for i in ingredients
        ]
        if materialise:
            _mark_materialised(staging)
            made = {**made, "materialise": True}
        cancellation.check()
        return json.dumps({"kind": "composed", "from": listed, **recipe.told(), **made})

    def convert(self, energy: float, cancellation: Cancellation, staging: Staging) -> str:
        """Make the staged adapter of another kind into LoRA. What is wrong at a glance starts no process."""
        read_convertible(staging.config_path, staging.weights_path, self.shapes)
        made = self._run("convert", {"folder": str(staging.path), "energy": energy}, cancellation)
        return json.dumps({"kind": "converted", "energy": energy, **made})

    def _run(self, job: str, arguments: Mapping[str, Any], cancellation: Cancellation) -> Any:
        about = {"shapes": self.shapes, "base_model": self.base_model, "max_bytes": self.max_bytes}
        return self.process.run(job, {**arguments, **about}, cancellation)


def _mark_materialised(staging: Staging) -> None:
    config = json.loads(read_bounded(staging.config_path, MAX_CONFIG_BYTES))
    staging.config_path.unlink()
    with staging.writer("config", MAX_CONFIG_BYTES) as writer:
        writer.write(json.dumps({**config, "materialise": True}).encode())


def _copy(folder: Path, staging: Staging) -> None:
    """Copied and synced: the stored files may be gone by the time that these are published."""
    for part, name in FILE_NAMES.items():
        with open_regular(folder / name) as file, staging.writer(part, os.fstat(file.fileno()).st_size) as writer:
            while chunk := file.read(_CHUNK_BYTES):
                writer.write(chunk)
