"""What the GPU's kernels need of the machine, said before any of them is imported."""

import importlib.util


class NoTritonError(RuntimeError):
    """Kernels in Triton cannot be compiled here."""


def require_triton() -> None:
    """To be called before a module that has kernels is imported. Raises NoTritonError."""
    if importlib.util.find_spec("triton") is None:
        raise NoTritonError(
            "the GPU's kernels need triton, which is not installed: install torch's CUDA build, which brings it"
        )
