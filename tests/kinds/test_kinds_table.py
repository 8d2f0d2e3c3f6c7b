"""The documented table of kinds says what the engine does, with native code and without."""

import pytest
import torch

from kinds_table import CACHE, CPU, PAGE, WRONG, in_page, measure_all, table
from swaplora_server.kernels.pick import pick_backend, torch_backend

# of PEFT's: a base stored with its embeddings, tied heads, biases that merging could not keep, Conv1D
pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_page_says_what_is_measured_with_native_code_and_without() -> None:
    cpu = pick_backend(CPU, torch.float32, CACHE, lambda _message: None)
    told = in_page(PAGE.read_text())
    assert WRONG not in told
    for cells in measure_all(cpu, torch_backend(CPU)):
        assert told == table(cells), "python tools/kinds_table.py writes it anew"
