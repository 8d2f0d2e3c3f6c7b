"""Vectors as embeddings: of a length that the base was trained for, and of length 1."""

from collections.abc import Sequence

import numpy as np

from swaplora_server.engine.request import Vector
from swaplora_server.service.errors import RequestError
from swaplora_server.service.service import Service


def check_dimensions(service: Service, wanted: int | None) -> None:
    """Raise RequestError unless the base's embeddings can be cut to so many numbers, or have as many."""
    config = service.base.model.config
    whole = config.get_text_config().hidden_size
    if wanted in (None, whole):
        return
    trained = getattr(config, "matryoshka_dimensions", None)
    if trained:
        allowed, told = wanted in trained, f"{', '.join(map(str, trained))} or {whole}"
    else:
        allowed, told = bool(getattr(config, "is_matryoshka", False)) and wanted < whole, f"{whole}"
    if not allowed:
        message = (
            f"the base's embeddings have {told} numbers, and were not trained to be cut to {wanted}: leave dimensions "
            "out"
        )
        raise RequestError("invalid_request", message, "dimensions")


def embeddings(vectors: Sequence[Vector], dimensions: int | None, *, normalises: bool) -> list[Vector]:
    """Each cut to its first `dimensions` numbers; of length 1 if `normalises`."""
    cut = [vector[:dimensions] for vector in vectors]
    return [normalised(vector) for vector in cut] if normalises else cut


def normalised(vectors: Vector) -> Vector:
    """[..., hidden_size], each of length 1, the same whatever it lies beside."""
    lengths = np.sqrt(np.square(vectors, dtype=np.float64).sum(-1, keepdims=True))
    found: Vector = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    return found
