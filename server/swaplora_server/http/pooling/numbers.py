"""Vectors in JSON: as lists, or the bytes of their float32, little-endian, as base64."""

import base64
from collections.abc import Callable
from typing import Any, Literal

from swaplora_server.engine.request import Vector


def written_as(encoding_format: Literal["float", "base64"]) -> Callable[[Vector], Any]:
    """What makes of an array, of any shape, what stands in an answer."""
    return _base64 if encoding_format == "base64" else _floats


def _floats(numbers: Vector) -> Any:
    return numbers.tolist()


def _base64(numbers: Vector) -> str:
    return base64.b64encode(numbers.astype("<f4").tobytes()).decode()
