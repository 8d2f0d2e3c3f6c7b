"""In which shapes the GPU's LoRA kernels are compiled: fixed tables, so that every one of them is tried beforehand.

Imports neither torch nor triton.
"""

from dataclasses import dataclass

PROGRAMS_PER_PROCESSOR = 2  # that run at once
REGISTERS = 64 << 10  # of a processor
GROUP = 4  # modules of one launch
SLICE = 1024  # features of one plane of h, whatever runs beside it


@dataclass(frozen=True, slots=True)
class Shape:
    """The constants of a kernel, and how it is launched."""

    ranks: int  # at a time
    block: int  # features of x, or columns of y, at a time
    num_warps: int = 4
    num_stages: int = 2

    @property
    def max_registers(self) -> int:
        """Of each thread, so that all programs run at once: else the compiler spills to make room for more."""
        return min(248, REGISTERS // PROGRAMS_PER_PROCESSOR // (32 * self.num_warps))


@dataclass(frozen=True, slots=True)
class Launch:
    """A shape for rows that are multiples of 16 elements at multiples of 16 bytes, or for any."""

    shape: Shape
    is_aligned: bool

    @property
    def constants(self) -> dict[str, int]:
        """Which the kernel is compiled with."""
        return {"RANKS": self.shape.ranks, "BLOCK": self.shape.block, "IS_ALIGNED": int(self.is_aligned)}

    @property
    def options(self) -> dict[str, int]:
        """All that a launch says beside the kernel's arguments."""
        return self.constants | {
            "num_warps": self.shape.num_warps,
            "num_stages": self.shape.num_stages,
            "maxnreg": self.shape.max_registers,
            "enable_fp_fusion": True,
        }


# by the rows' number format
_SHRINK = {
    "float32": Shape(ranks=16, block=32, num_stages=3),
    "float16": Shape(ranks=32, block=128, num_stages=4),
    "bfloat16": Shape(ranks=32, block=128, num_stages=4),
}
_EXPAND = {
    "float32": Shape(ranks=16, block=32, num_warps=2),
    "float16": Shape(ranks=32, block=128, num_warps=8),
    "bfloat16": Shape(ranks=32, block=128, num_warps=8),
}
# of rows that are read element by element: each holds an address of its own
_UNALIGNED = Shape(ranks=16, block=32)


def shrink_launch(dtype: str, *, is_aligned: bool) -> Launch:
    """How `lora_shrink` is launched for rows in a number format."""
    return Launch(_SHRINK[dtype] if is_aligned else _UNALIGNED, is_aligned)


def expand_launch(dtype: str, *, is_aligned: bool) -> Launch:
    """How `lora_expand` is launched for rows in a number format."""
    return Launch(_EXPAND[dtype] if is_aligned else _UNALIGNED, is_aligned)
