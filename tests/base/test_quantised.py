"""LoRA on bases of 8 and 4 bits: what PEFT gives on the same quantised base, in memory that really is smaller."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedModel

import tiny
from mixed_batch import NUM_DECODED, MixedBatch, random_adapter, replacing_adapter, scaled_adapter
from oracle import Oracle
from repository import KERNEL_CACHE
from serving import BASE, Running, Streamed, serving, settings
from sixteen_adapters import MAX_TOKENS, TOLERANCE, error_against, prompt_of, stream_all
from swaplora_server.base import proof, quantisation
from swaplora_server.base.base_model import BaseModel, load_base
from swaplora_server.base.layers import weight_of
from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.base.quantisation import (
    Quantization,
    loading_arguments,
    multiply_bytes_dequantised,
    multiply_dequantised,
)
from swaplora_server.engine.lora.modules import LoraLinear
from swaplora_server.kernels.backend import Backend, RunningStep
from swaplora_server.kernels.cpu import abi
from swaplora_server.kernels.cpu.backend import CpuBackend
from swaplora_server.kernels.cpu.decoder import CpuDecoder
from swaplora_server.kernels.cpu.linear import CpuLinear
from swaplora_server.kernels.cpu.quantised_linear import QuantisedLinear
from swaplora_server.kernels.pick import pick_backend, torch_backend

CPU = torch.device("cpu")
CACHE = KERNEL_CACHE
CPU_BACKEND = pick_backend(CPU, torch.float32, CACHE, lambda _message: None)


class LayerByLayer(CpuBackend):
    """The same without the one native call."""

    def wrap(self, _model: PreTrainedModel, _running: Callable[[], RunningStep]) -> None:
        return None


LAYER_BY_LAYER = LayerByLayer(abi.load_library(CACHE, lambda _message: None), torch.float32)
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**tiny.LLAMA, **SHAPE}
CONFIGS = {
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


def stock(base: Path, config: BitsAndBytesConfig | None) -> PreTrainedModel:
    """Transformers' own quantised model on a CPU; a base that was saved quantised needs no `config`."""
    arguments = {} if config is None else {"quantization_config": config}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager", device_map={"": CPU}, **arguments
    )
    return model


class QuantisedOracle(Oracle):
    """PEFT on the quantised base, whose linears multiply with the dequantised weights as they do in training."""

    def __init__(self, base: Path, config: BitsAndBytesConfig | None, adapter: Path | None = None) -> None:
        model = stock(base, config)
        self._model = model if adapter is None else PeftModel.from_pretrained(model, str(adapter))
        self._model.eval()
        multiply_dequantised(self._model)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny_base(tmp_path_factory.mktemp("base"), LLAMA)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [tiny.save_adapter(folder / f"a{seed}", base, seed=seed, rank=rank) for seed, rank in enumerate((7, 16))]


def load(folder: Path, quantization: Quantization | None, backend: Backend = CPU_BACKEND) -> BaseModel:
    return load_base(folder, device=CPU, dtype=torch.float32, backend=backend, quantization=quantization)


def linears_of(base: BaseModel) -> dict[str, nn.Module]:
    """What stands behind each wrapped linear."""
    return {path: module.base for path, module in base.model.named_modules() if isinstance(module, LoraLinear)}


@pytest.fixture(scope="module", params=CONFIGS)
def quantized(
    request: pytest.FixtureRequest, base: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Running]]:
    with serving(settings(base, tmp_path_factory.mktemp("data"), quantization=request.param)) as server:
        for folder in adapters:
            assert server.put(folder.name, folder).status_code == 201
        yield request.param, server


def error_of(oracle: Oracle, name: str, said: Streamed) -> float:
    assert len(said.token_ids) == MAX_TOKENS
    assert oracle.is_greedy(prompt_of(name), said.token_ids, tie=2 * TOLERANCE)
    return error_against(oracle, name, said)


async def test_base_and_adapters_alone_and_in_one_batch_equal_peft(
    quantized: tuple[str, Running], base: Path, adapters: list[Path]
) -> None:
    kind, server = quantized
    names = [BASE, *(folder.name for folder in adapters)]
    together = await stream_all(server, names)
    for name, folder, mixed in zip(names, [None, *adapters], together, strict=True):
        (alone,) = await stream_all(server, [name])
        oracle = QuantisedOracle(base, CONFIGS[kind], folder)
        assert error_of(oracle, name, alone) <= TOLERANCE, name
        assert error_of(oracle, name, mixed) <= TOLERANCE, name
        assert (mixed.token_ids, mixed.logprobs) == (alone.token_ids, alone.logprobs)


async def test_adapters_and_quantisation_both_move_the_output(
    quantized: tuple[str, Running], base: Path, adapters: list[Path]
) -> None:
    kind, server = quantized
    plain, without = Oracle(base), QuantisedOracle(base, CONFIGS[kind])
    said = await stream_all(server, [BASE, *(folder.name for folder in adapters)])
    assert plain.worst_error(prompt_of(BASE), said[0].token_ids, said[0].logprobs) > 100 * TOLERANCE
    for folder, adapted in zip(adapters, said[1:], strict=True):
        assert without.worst_error(prompt_of(folder.name), adapted.token_ids, adapted.logprobs) > 0.5


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("count", [1, 7, 33])
def test_logits_do_not_depend_on_the_batch(kind: Quantization, count: int, base: Path) -> None:
    loaded = load(base, kind)
    adapters = [random_adapter(loaded, rank, seed) for seed, rank in enumerate([1, 7, 16, 33])]
    adapters += [scaled_adapter(loaded, 7, 4), replacing_adapter(loaded, 5)]
    batch = MixedBatch(loaded, adapters, count, seed=count)
    together = batch.together()
    for number in range(count):
        alone = batch.alone(number)
        assert len(alone) == NUM_DECODED + 1
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(alone, together[number], strict=True))


def moved_by_a_neighbour(linear: nn.Module) -> float:
    """By how much a row of it changes beside one with an outlier in every other column."""
    rng = torch.Generator().manual_seed(0)
    row = torch.randn(1, 128, generator=rng)
    outlier = 50.0 * torch.ones(1, 128) * (torch.arange(128) % 2)
    return float((linear(torch.cat([row, outlier]))[:1] - linear(row)).abs().max() / linear(row).abs().max())


@torch.inference_mode()
def test_a_gpus_int8_rows_move_by_no_more_than_rounding_beside_an_outlier(base: Path) -> None:
    model = stock(base, CONFIGS["int8"])
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    dense = weight_of(linear).clone()
    assert moved_by_a_neighbour(linear) > 1e-3, "the stock product was to depend on neighbours"
    multiply_bytes_dequantised(model)
    assert moved_by_a_neighbour(linear) < 1e-6
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(linear(x), x @ dense.t())
    for dtype in (torch.bfloat16, torch.float16):
        half = linear(x.to(dtype))
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), x @ dense.t(), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapters_own_modules_run_beside_codes_as_they_do_layer_by_layer(kind: Quantization, base: Path) -> None:
    logits = []
    for loaded in (load(base, kind), load(base, kind, LAYER_BY_LAYER)):
        adapters = [replacing_adapter(loaded, 0), scaled_adapter(loaded, 7, 1), random_adapter(loaded, 5, 2)]
        logits.append(MixedBatch(loaded, adapters, 9, seed=3).together())
    for number, rows in logits[0].items():
        torch.testing.assert_close(torch.stack(rows), torch.stack(logits[1][number]), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.55), ("nf4", 0.35)])
def test_linears_take_a_share_of_what_they_take_in_bfloat16(kind: Quantization, share: float, base: Path) -> None:
    linears = linears_of(load(base, kind, LAYER_BY_LAYER))
    assert len(linears) == 2 * 7 + 1
    for path, linear in linears.items():
        if path != "lm_head":
            assert isinstance(linear, QuantisedLinear)
            assert not list(linear.parameters())
            num_bytes = sum(buffer.numel() * buffer.element_size() for buffer in linear.buffers())
            assert num_bytes <= share * 2 * linear.in_features * linear.out_features, path
    assert isinstance(linears["lm_head"], CpuLinear), "what the quantiser leaves alone runs as it always does"


@pytest.mark.parametrize("kind", CONFIGS)
def test_all_layers_run_in_one_native_call(kind: Quantization, base: Path) -> None:
    decoder: Any = load(base, kind).model.get_decoder()
    assert [type(layer) for layer in decoder.layers] == [CpuDecoder]


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the proof allow a ten-thousandth of a standard deviation of the logits, and no more."""
    monkeypatch.setattr(proof, "TOLERANCE", 1e-4)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "fields",
    [
        LLAMA,
        {"model_type": "qwen2", **SHAPE, "intermediate_size": 96, "num_key_value_heads": 2},
        {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    ],
    ids=lambda fields: fields["model_type"],
)
def test_logits_are_the_stock_quantised_models_own(kind: Quantization, fields: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny.save_tiny_base(tmp_path, fields)
    for backend in (CPU_BACKEND, torch_backend(CPU)):
        assert load(folder, kind, backend).layers.linears == load(folder, None, backend).layers.linears


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
    "config",
    [
        CONFIGS["int8"],
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    ],
    ids=["int8", "nf4", "fp4"],
)
def test_a_base_saved_quantised_is_served_as_it_is(config: BitsAndBytesConfig, base: Path, tmp_path: Path) -> None:
    model = stock(base, config)
    model.save_pretrained(tmp_path / "saved")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "saved")
    expected = {path: weight_of(linear) for path, linear in model.named_modules() if isinstance(linear, nn.Linear)}
    served = linears_of(load(tmp_path / "saved", None, LAYER_BY_LAYER))
    assert served.keys() == expected.keys()
    for path, linear in served.items():
        assert path == "lm_head" or torch.equal(weight_of(linear), expected[path])


def refusal(wanted: Quantization | None, **saved: Any) -> str:
    config = LlamaConfig(quantization_config=saved) if saved else LlamaConfig()
    with pytest.raises(UnsupportedModelError) as caught:
        loading_arguments(config, wanted, CPU, torch.float32)
    return str(caught.value)


def test_without_bitsandbytes_the_refusal_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantisation, "is_bitsandbytes_available", lambda: False)
    for message, field in (
        (refusal("nf4"), "quantization nf4"),
        (refusal(None, quant_method="bitsandbytes", load_in_8bit=True), "quantization_config"),
    ):
        assert field in message
        assert "pip install 'swaplora[quantized]'" in message
    assert loading_arguments(LlamaConfig(), None, CPU, torch.float32) == {}


def test_what_is_not_served_is_refused_by_name() -> None:
    assert "quant_method gptq" in refusal(None, quant_method="gptq", bits=4)
    assert "quant_method gptq" in refusal("nf4", quant_method="gptq", bits=4)
    assert "llm_int8_has_fp16_weight" in refusal(None, load_in_8bit=True, llm_int8_has_fp16_weight=True)
    message = refusal("nf4", quant_method="bitsandbytes", load_in_8bit=True)
    assert "quantization nf4" in message
    assert "int8" in message


def test_the_setting_takes_two_values_and_no_other(base: Path, tmp_path: Path) -> None:
    assert settings(base, tmp_path, quantization="nf4").quantization == "nf4"
    with pytest.raises(ValidationError, match="quantization"):
        settings(base, tmp_path, quantization="int4")
