"""Experts are multiplied in groups, and nothing in a step waits for what is on the device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from architectures import ARCHITECTURES
from swaplora_server.base.base_model import load_base
from swaplora_server.kernels.pick import torch_backend

CPU = torch.device("cpu")
# whose results, or their shapes, the host has to know
WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique", "aten.bincount")


class _Waiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What would wait, were it on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if str(operation).startswith(WAITING):
            self.seen.add(str(operation))
        return operation(*arguments, **(options or {}))


def waits_of(folder: Path) -> set[str]:
    """Of the experts of a base as it is served."""
    base = load_base(folder, device=CPU, dtype=torch.float32, backend=torch_backend(CPU))
    (experts, *_) = (module for module in base.model.modules() if type(module).__name__.endswith("Experts"))
    index = torch.tensor([[0, 2], [3, 2], [2, 1]])
    with torch.inference_mode(), _Waiting() as waiting:
        experts(torch.randn(3, 32), index, torch.rand(3, 2))
    seen: set[str] = waiting.seen
    return seen


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_nothing_waits_for_which_experts_rows_have(kind: str, tmp_path: Path) -> None:
    folder = tiny.save_tiny_base(tmp_path, {"model_type": kind, **ARCHITECTURES[kind]})
    assert waits_of(folder) == set()
