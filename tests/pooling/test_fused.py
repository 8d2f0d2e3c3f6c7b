"""Layers of an encoder in one native call: which are, that they compute the same, and that a fault is found."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import structlog
import torch
from torch import Tensor
from transformers import AutoModel

from repository import KERNEL_CACHE
from swaplora_server.base.encoder.encoder_base import EncoderBase, load_encoder
from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.engine.pooling.kinds import LAST_TOKEN
from swaplora_server.engine.request import Request, SamplingParams
from swaplora_server.engine.request import Sequence as Tokens
from swaplora_server.engine.scheduling.batch import Batch, rows_of
from swaplora_server.kernels import bert_like, modern_like
from swaplora_server.kernels.backend import LayerAttention, StepRows
from swaplora_server.kernels.cpu import abi, decoder, encoder, modern_encoder, whole_attention
from swaplora_server.kernels.cpu.backend import CpuBackend
from swaplora_server.kernels.cpu.encoder import CpuEncoder
from swaplora_server.kernels.cpu.modern_encoder import CpuModernLayer
from swaplora_server.kernels.step import Runs, Segments
from tiny_encoders import ARCHITECTURES, save_encoder

CPU = torch.device("cpu")
LIBRARY = abi.load_library(KERNEL_CACHE, lambda _message: None)
FUSED = {
    "bert": ("encoder.layer", [CpuEncoder.__name__]),
    "roberta": ("encoder.layer", [CpuEncoder.__name__]),
    "xlm-roberta": ("encoder.layer", [CpuEncoder.__name__]),
    "distilbert": ("transformer.layer", [CpuEncoder.__name__]),
    "modernbert": ("layers", [CpuModernLayer.__name__] * 3),
}
INPUTS = [[5], list(range(100)), [9, 8, 7], list(range(30, 63))]


def load(folder: Path) -> EncoderBase:
    return load_encoder(folder, device=CPU, dtype=torch.float32, backend=CpuBackend(LIBRARY, torch.float32))


def layers(base: EncoderBase, path: str = "encoder.layer") -> list[str]:
    return [type(layer).__name__ for layer in base.model.get_submodule(path).children()]


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
def test_layers_are_native_calls_and_compute_the_same_to_the_same_bits_in_any_company(
    architecture: str, tmp_path: Path
) -> None:
    base = load(save_encoder(tmp_path, architecture))
    path, fused = FUSED[architecture]
    assert layers(base, path) == fused
    stock = AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    together = states(base, INPUTS)
    for ids, found in zip(INPUTS, together, strict=True):
        assert (found - stock(torch.tensor([ids])).last_hidden_state[0]).abs().max() <= 1e-5
        assert torch.equal(states(base, [ids])[0], found)


def test_layers_of_another_kind_are_left_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(save_encoder(tmp_path / "deberta", "deberta-v2"))
    assert layers(base) == ["DebertaV2Layer", "DebertaV2Layer"]
    monkeypatch.setitem(ARCHITECTURES["bert"], "hidden_act", "relu")
    base = load(save_encoder(tmp_path / "bert", "bert"))
    assert layers(base) == ["BertLayer", "BertLayer"]
    monkeypatch.setitem(ARCHITECTURES["modernbert"], "hidden_activation", "gelu_pytorch_tanh")
    base = load(save_encoder(tmp_path / "modern", "modernbert"))
    assert layers(base, "layers") == ["ModernBertEncoderLayer"] * 3


def attention_scaled_otherwise(patch: pytest.MonkeyPatch) -> None:
    for parts in (bert_like.Parts, modern_like.Parts):
        patch.setattr(parts, "attention", property(lambda _parts: LayerAttention(0, 0.4)))


def own_modules_left_out(patch: pytest.MonkeyPatch) -> None:
    replaced = decoder.replaced_of
    for fused in (encoder, modern_encoder):
        patch.setattr(fused, "replaced_of", lambda _segments: replaced(Segments()))


def no_deltas(patch: pytest.MonkeyPatch) -> None:
    rows = decoder.rows_of
    for fused in (encoder, modern_encoder):
        patch.setattr(fused, "rows_of", lambda count, own, given: rows(count, StepRows(own.segments, None), given))


def windows_left_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(modern_like.Parts, "attention", property(lambda parts: LayerAttention(0, parts.head_dim**-0.5)))


@pytest.mark.parametrize(
    ("architecture", "plant"),
    [
        ("bert", attention_scaled_otherwise),
        ("bert", own_modules_left_out),
        ("bert", no_deltas),
        ("modernbert", attention_scaled_otherwise),
        ("modernbert", own_modules_left_out),
        ("modernbert", no_deltas),
        ("modernbert", windows_left_out),
    ],
)
def test_a_fused_layer_that_computes_something_else_is_found_at_start_and_not_served(
    architecture: str, plant: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with structlog.testing.capture_logs() as logs:
        base = load(save_encoder(tmp_path, architecture))
    assert [log["event"] for log in logs] == ["layers run one operation at a time"]
    assert "when layers are fused" in logs[0]["reason"]
    path, fused = FUSED[architecture]
    assert set(layers(base, path)) == {"BertLayer" if architecture == "bert" else "ModernBertEncoderLayer"}
    assert layers(base, path) != fused


def refuses_a_shape(*_: object, **__: object) -> None:
    raise ValueError("a shape that no kernel takes")


@pytest.mark.parametrize(("owner", "name"), [(CpuBackend, "wrap"), (CpuEncoder, "forward")])
def test_layers_that_cannot_be_fused_or_do_not_run_so_are_served_one_operation_at_a_time(
    owner: type, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, refuses_a_shape)
    with structlog.testing.capture_logs() as logs:
        base = load(save_encoder(tmp_path, "bert"))
    assert [log["event"] for log in logs] == ["layers run one operation at a time"]
    assert "a shape that no kernel takes" in logs[0]["reason"]
    assert layers(base) == ["BertLayer", "BertLayer"]


def test_a_fault_beyond_the_first_block_of_an_input_is_found_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_alone(starts: list[int], lengths: list[int], tables: list[range], size: int) -> Runs:
        return Runs(starts, lengths, [[table[0]] * len(table) for table in tables], size)

    monkeypatch.setattr(whole_attention, "Runs", first_alone)
    with pytest.raises(UnsupportedModelError, match="when inputs are packed"):
        load(save_encoder(tmp_path, "bert"))
