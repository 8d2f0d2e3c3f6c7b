"""Layers of an encoder in one native call: which are, that they compute the same, and that a fault is found."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import structlog
import torch
from torch import Tensor
from transformers import AutoModel

from repository import KERNEL_CACHE
from swaplora_server.base.encoder.encoder_base import EncoderBase, load_encoder
from swaplora_server.engine.pooling.kinds import LAST_TOKEN
from swaplora_server.engine.request import Request, SamplingParams
from swaplora_server.engine.request import Sequence as Tokens
from swaplora_server.engine.scheduling.batch import Batch, rows_of
from swaplora_server.kernels import bert_like
from swaplora_server.kernels.backend import LayerAttention
from swaplora_server.kernels.cpu import abi
from swaplora_server.kernels.cpu.backend import CpuBackend
from swaplora_server.kernels.cpu.encoder import CpuEncoder
from tiny_encoders import ARCHITECTURES, save_encoder

CPU = torch.device("cpu")
LIBRARY = abi.load_library(KERNEL_CACHE, lambda _message: None)
FUSED = {"bert": "encoder", "roberta": "encoder", "xlm-roberta": "encoder", "distilbert": "transformer"}
INPUTS = [[5], list(range(100)), [9, 8, 7], list(range(30, 63))]


def load(folder: Path) -> EncoderBase:
    return load_encoder(folder, device=CPU, dtype=torch.float32, backend=CpuBackend(LIBRARY, torch.float32))


def layers(base: EncoderBase, owner: str) -> list[str]:
    return [type(layer).__name__ for layer in getattr(base.model, owner).layer]


def states(base: EncoderBase, inputs: Sequence[Sequence[int]]) -> Sequence[Tensor]:
    rows = []
    for number, ids in enumerate(inputs):
        sequence = Tokens(Request("", tuple(ids), SamplingParams(0), lambda _event: None, reads=LAST_TOKEN), number)
        sequence.block_table = [1]
        rows.append(rows_of(sequence, 0, len(ids)))
    outputs = base.input_runner().outputs(Batch(tuple(rows)), has_pooled=False)
    return torch.split(outputs.states, [len(ids) for ids in inputs])


@pytest.mark.parametrize("architecture", FUSED)
@torch.no_grad()
def test_layers_of_berts_kind_are_one_call_and_compute_the_same_to_the_same_bits_in_any_company(
    architecture: str, tmp_path: Path
) -> None:
    base = load(save_encoder(tmp_path, architecture))
    assert layers(base, FUSED[architecture]) == [CpuEncoder.__name__]
    stock = AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    together = states(base, INPUTS)
    for ids, found in zip(INPUTS, together, strict=True):
        assert (found - stock(torch.tensor([ids])).last_hidden_state[0]).abs().max() <= 1e-5
        assert torch.equal(states(base, [ids])[0], found)


def test_layers_of_another_kind_are_left_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modern = load(save_encoder(tmp_path / "modern", "modernbert"))
    assert all(type(layer).__name__ == "ModernBertEncoderLayer" for layer in modern.model.layers)
    monkeypatch.setitem(ARCHITECTURES["bert"], "hidden_act", "relu")  # type: ignore[arg-type]
    base = load(save_encoder(tmp_path / "bert", "bert"))
    assert layers(base, "encoder") == ["BertLayer", "BertLayer"]


def test_a_fused_layer_that_computes_something_else_is_found_at_start_and_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_layer = bert_like.Parts.attention.fget  # type: ignore[attr-defined]

    def off(parts: bert_like.Parts) -> LayerAttention:
        right: LayerAttention = of_layer(parts)
        return LayerAttention(0, right.scaling * 1.1)

    monkeypatch.setattr(bert_like.Parts, "attention", property(off))
    with structlog.testing.capture_logs() as logs:
        base = load(save_encoder(tmp_path, "bert"))
    assert [log["event"] for log in logs] == ["layers run one operation at a time"]
    assert "computes something else when layers are fused" in logs[0]["reason"]
    assert layers(base, "encoder") == ["BertLayer", "BertLayer"]
