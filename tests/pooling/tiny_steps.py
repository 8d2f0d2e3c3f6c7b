"""Steps of an encoder without a server: inputs, who answers, and what is read of each."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from repository import ROOT
from swaplora_adapters.weights.load import load_weights
from swaplora_server.base.encoder.encoder_base import EncoderBase, load_encoder
from swaplora_server.engine.pooling.encoder_runner import EncoderRunner
from swaplora_server.engine.pooling.kinds import Reader
from swaplora_server.engine.request import AdapterUse, Request, SamplingParams
from swaplora_server.engine.request import Sequence as Tokens
from swaplora_server.engine.scheduling.batch import Batch, rows_of
from swaplora_server.kernels.pick import pick_backend

CPU = torch.device("cpu")
Asked = tuple[Sequence[int], tuple[AdapterUse, ...], Reader]


def loaded(folder: Path) -> EncoderBase:
    backend = pick_backend(CPU, torch.float32, ROOT / ".cache" / "native", lambda _message: None)
    return load_encoder(folder, device=CPU, dtype=torch.float32, backend=backend)


def use_of(base: EncoderBase, folder: Path) -> tuple[AdapterUse, ...]:
    files = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    weights = load_weights(folder.name, *files, base.layers, base.dtype, CPU, base.backend.placement)
    return (AdapterUse(base.prepared(weights), 1.0, folder.name),)


def read(runner: EncoderRunner, asked: Sequence[Asked]) -> list[NDArray[np.float32]]:
    """Of one step."""
    scheduled = []
    for number, (token_ids, uses, reads) in enumerate(asked):
        request = Request(str(number), tuple(token_ids), SamplingParams(0), lambda _event: None, uses, reads=reads)
        sequence = Tokens(request, number)
        sequence.block_table = [1]
        scheduled.append(rows_of(sequence, 0, len(token_ids)))
    return [sampled.hidden for sampled in runner.run(Batch(tuple(scheduled))) if sampled.hidden is not None]
