"""What the GPU's kernels read of one adapter, by the number of each module: made when it is loaded, freed with it."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from swaplora_adapters.weights.served import AdapterWeights, LinearWeights
from swaplora_server.kernels.torch.lora import ModulesByNumber

WORDS = 8  # addresses of A, B, column scale and shift, rank, flags, and two that nobody reads
ADDS, IS_BF16_A, IS_BF16_B = 1, 2, 4  # flags: it adds to this module; what is in bfloat16 beside rows that are not
WIDTH = 16  # a row of h is a multiple of so many elements
ALIGNMENT = 16  # bytes


class AdapterTables(ModulesByNumber):
    """Where an adapter has its factors, on the device. Points into its own tensors, and into copies of some.

    A mixture's members are read by torch's operations, module by module.

    A is read row by row, B column by column, both in the rows' number format or in bfloat16. What is otherwise, or
    does not begin at a multiple of `ALIGNMENT`, is copied.
    """

    def __init__(self, weights: AdapterWeights, paths: Sequence[str], dtype: torch.dtype, device: torch.device) -> None:
        """`paths` are those of all modules by number, `dtype` the rows' number format."""
        super().__init__(weights, paths)
        self.dtype = dtype
        self.width = -(-max((module.rank for module in weights.modules.values()), default=0) // WIDTH) * WIDTH
        self._read: list[Tensor] = []  # by kernels, as long as this lives
        untargeted = [0] * WORDS
        rows = [untargeted if module is None else self._row(module) for module in self.modules]
        # in the order of the stream of steps, which it does not wait for: those that read it come later
        words = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._words = words.to(device, non_blocking=True)

    @property
    def address(self) -> int:
        """Of the table [num_modules, WORDS]. All of a row is zero where the adapter does not add to that module."""
        return self._words.data_ptr()

    def _row(self, module: LinearWeights) -> list[int]:
        factors = [
            self._readable(factor, (self.dtype, torch.bfloat16)) for factor in (module.lora_A, module.lora_B.t())
        ]
        vectors = [
            None if vector is None else self._readable(vector, (torch.float32,))
            for vector in (module.column_scale, module.shift)
        ]
        self._read += [tensor for tensor in (*factors, *vectors) if tensor is not None]
        of_A, of_B = (factor.dtype == torch.bfloat16 != self.dtype for factor in factors)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (*factors, *vectors)]
        return [*addresses, module.rank, ADDS | IS_BF16_A * of_A | IS_BF16_B * of_B, 0, 0]

    @staticmethod
    def _readable(tensor: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
        readable = tensor.to(tensor.dtype if tensor.dtype in dtypes else dtypes[0]).contiguous()
        return readable.clone() if readable.data_ptr() % ALIGNMENT else readable


def tables_of(adapters: Iterable[AdapterWeights], dtype: torch.dtype) -> list[AdapterTables]:
    """Those of prepared adapters. Raises RuntimeError for one that is not, or not for rows in `dtype`."""
    return [_tables_of(weights, dtype) for weights in adapters]


def _tables_of(weights: AdapterWeights, dtype: torch.dtype) -> AdapterTables:
    tables = weights.tables
    if not isinstance(tables, AdapterTables) or tables.dtype != dtype:
        raise RuntimeError(f"adapter {weights.digest} was not prepared for the GPU's kernels and rows in {dtype}")
    return tables
