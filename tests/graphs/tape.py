"""What stands in for a CUDA graph: operations and launches on a tape, which is played over the same memory.

As of a graph, all that Python decided is what it was when it was recorded: grids, sizes, addresses, numbers. A wait for
the device cannot be recorded. What was computed in between is poisoned each time, and whoever asks to be is told when a
replay has ended.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

_WAITS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal"}
_tape: "Tape | None" = None


def launch(run: Callable[[], None]) -> None:
    """A kernel's launch: onto the tape, where there is one, and done."""
    if _tape is not None:
        _tape.played.append(run)
    with _disable_current_modes():
        run()


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What is done while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.played: list[Callable[[], None]] = []
        self.made: list[Tensor] = []  # nobody has seen them before

    def __enter__(self) -> "Tape":
        global _tape
        _tape = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        global _tape
        _tape = None
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.partition(".")[0] in _WAITS:
            raise RuntimeError(f"operation not permitted while recording: {func}")
        given = _tensors((args, kwargs))
        out = func(*args, **(kwargs or {}))
        outs = _tensors(out)
        held = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.made += [one for one in outs if one.untyped_storage().data_ptr() not in held]

        def play() -> None:
            if "empty" in func.__name__:
                return  # poisoned already
            for one, again in zip(outs, _tensors(func(*args, **(kwargs or {}))), strict=True):
                one.copy_(again)  # of a view, and of what is written in place, onto itself

        self.played.append(play)
        return out

    def replay(self) -> None:
        """All of it once more, over what lies there now."""
        for tensor in self.made:
            poison(tensor)
        for play in self.played:
            play()


class TapeRecorder:
    """See `Recorder`."""

    def __init__(self, _device: torch.device) -> None: ...

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        tape = Tape()
        with tape:
            run()

        def replay() -> None:
            with torch.inference_mode():
                tape.replay()

        return replay


def poison(tensor: Tensor) -> None:
    """What no right result can be made of."""
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    elif tensor.dtype == torch.int64:
        tensor.fill_(-(1 << 40))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]
