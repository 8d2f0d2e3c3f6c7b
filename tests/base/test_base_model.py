"""Every architecture that goes through the attention interface: its logits are stock transformers' own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, masking_utils
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

import tiny
from architectures import ARCHITECTURES
from repository import KERNEL_CACHE
from swaplora_server.base import loading, proof
from swaplora_server.base.base_model import BaseModel, load_base
from swaplora_server.base.fingerprint import fingerprint_of
from swaplora_server.base.loading import pick_dtype
from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.engine import attention
from swaplora_server.engine.request import Request, SamplingParams, Sequence
from swaplora_server.engine.scheduling.batch import Batch, rows_of
from swaplora_server.kernels.backend import Backend, LayerAttention
from swaplora_server.kernels.cpu import build
from swaplora_server.kernels.cpu import linear as cpu_linear
from swaplora_server.kernels.cpu.decoder import CpuDecoder
from swaplora_server.kernels.llama_like import Parts
from swaplora_server.kernels.pick import pick_backend, prefers_bf16, torch_backend
from swaplora_server.kernels.torch.attention import PrefillRun

CPU = torch.device("cpu")
CPU_BACKEND = pick_backend(CPU, torch.float32, KERNEL_CACHE, lambda _message: None)


def load(folder: Path, backend: Backend = CPU_BACKEND, dtype: torch.dtype = torch.float32) -> BaseModel:
    return load_base(folder, device=CPU, dtype=dtype, backend=backend)


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the proof allow a ten-thousandth of a standard deviation of the logits, and no more."""
    monkeypatch.setattr(proof, "TOLERANCE", 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_of_which_anything_differs_has_another_fingerprint(tmp_path: Path, dtype: torch.dtype) -> None:
    folders = [tiny.save_tiny_base(tmp_path / name) for name in ("here", "there")]

    def read(folder: Path) -> tuple[Any, Any]:
        return (
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
            AutoTokenizer.from_pretrained(folder),
        )

    model, tokenizer = read(folders[0])
    seen = {fingerprint_of(model, tokenizer)}
    assert seen == {fingerprint_of(*read(folders[1]))}  # wherever it lies
    for tensor in list(model.parameters())[:6]:
        with torch.no_grad():
            tensor.view(-1)[-1].add_(0.5)
            seen.add(fingerprint_of(model, tokenizer))
            if tensor.dim() > 1:
                tensor[[0, 1]] = tensor[[1, 0]]
                seen.add(fingerprint_of(model, tokenizer))
    assert len(seen) == 1 + sum(min(2, tensor.dim()) for tensor in list(model.parameters())[:6])
    tokenizer.chat_template = "{{ messages }}"
    model.config.rope_theta_of_a_test = 7
    seen |= {fingerprint_of(model, tokenizer), fingerprint_of(read(folders[0])[0], tokenizer)}
    assert len(seen) == 3 + sum(min(2, tensor.dim()) for tensor in list(model.parameters())[:6])


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_logits_are_stock_transformers_own(model_type: str, tmp_path: Path) -> None:
    folder = tiny.save_tiny_base(tmp_path, {"model_type": model_type, **ARCHITECTURES[model_type]})
    for backend in (CPU_BACKEND, torch_backend(CPU)):
        base = load(folder, backend)
        assert base.layers.linears
        assert base.kv_bytes_per_token > 0


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text"])
def test_no_forward_looks_whether_its_sequences_are_packed(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the look costs a wait for all that was launched before."""
    folder = tiny.save_tiny_base(tmp_path, {"model_type": model_type, **ARCHITECTURES[model_type]})
    base = load(folder, torch_backend(CPU))
    looks: list[Tensor] = []
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", looks.append)
    sequence = Sequence(Request("r", (1, 2, 3), SamplingParams(max_tokens=1), emit=lambda _event: None), 0)
    sequence.block_table = [1]
    base.runner(1, 4).logits(Batch((rows_of(sequence, 0, 3),)))
    assert not looks


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_bfloat16_logits_are_as_near_to_float32_as_stock_transformers_own(model_type: str, tmp_path: Path) -> None:
    folder = tiny.save_tiny_base(tmp_path, {"model_type": model_type, **ARCHITECTURES[model_type]})
    assert load(folder, torch_backend(CPU), torch.bfloat16).layers.linears


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_window_is_noticed(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefillRun, "mask", lambda self, _window: PrefillRun._make_mask(self, None))  # noqa: SLF001
    folder = tiny.save_tiny_base(tmp_path, {"model_type": "mistral", **ARCHITECTURES["mistral"]})
    with pytest.raises(UnsupportedModelError, match="something else"):
        load(folder, torch_backend(CPU), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fault_of_a_tenth_of_a_standard_deviation_is_noticed(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = attention.paged_attention
    monkeypatch.setattr(
        attention, "paged_attention", lambda *rows, scaling, **asked: attend(*rows, scaling=1.2 * scaling, **asked)
    )
    with pytest.raises(UnsupportedModelError, match="something else"):
        load(tiny.save_tiny_base(tmp_path), torch_backend(CPU), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_attends_by_itself_is_refused(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_itself = modeling_llama.eager_attention_forward
    monkeypatch.setattr(modeling_llama.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda _name, _default: by_itself)
    with pytest.raises(UnsupportedModelError, match="llama computes something else"):
        load(tiny.save_tiny_base(tmp_path), torch_backend(CPU), dtype)


@pytest.mark.usefixtures("strict")
def test_gptj_is_served_as_soon_as_transformers_has_it_ask_the_attention_interface(tmp_path: Path) -> None:
    """Up to 5.23 it attended by itself."""
    folder = tiny.save_tiny_base(
        tmp_path, {"model_type": "gptj", "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
    )
    if hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS"):
        assert load(folder).layers.linears
        return
    with pytest.raises(UnsupportedModelError, match="gptj"):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}, "bloom"),
        ({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2}, "mamba"),
        (
            {
                "model_type": "gpt_neo",
                "num_layers": 2,
                "attention_types": [[["global", "local"], 1]],
                "hidden_size": 32,
                "num_heads": 4,
            },
            "gpt_neo",
        ),
    ],
)
def test_architecture_that_cannot_be_served_is_refused_with_the_reason(
    fields: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        load(tiny.save_tiny_base(tmp_path, fields))


def test_linears_that_do_not_see_every_token_are_no_targets(tmp_path: Path) -> None:
    """Routed experts compute some rows only, so a row's adapter could not be told."""
    base = load(tiny.save_tiny_base(tmp_path, {"model_type": "mixtral", **ARCHITECTURES["mixtral"]}))
    assert {path.rpartition(".")[2] for path in base.layers.linears} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "lm_head",
    }


def test_no_plain_copy_of_a_packed_weight_is_kept(tmp_path: Path) -> None:
    base = load(tiny.save_tiny_base(tmp_path))
    left = {name for name, _ in base.model.named_parameters()}
    assert left == {"model.norm.base.weight"}, "besides these, the native decoder has all"


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_layers_of_llamas_kind_run_in_one_native_call(model_type: str, tmp_path: Path) -> None:
    base = load(tiny.save_tiny_base(tmp_path, {"model_type": model_type, **ARCHITECTURES[model_type]}))
    assert [type(layer) for layer in base.model.model.layers] == [CpuDecoder]


def test_layers_that_fail_the_proof_in_one_call_run_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Parts, "attention", property(lambda parts: LayerAttention(parts.layer.self_attn.layer_idx, 1.0))
    )
    base = load(tiny.save_tiny_base(tmp_path))
    assert len(base.model.model.layers) == 2
    assert base.layers.linears


@pytest.mark.parametrize("is_faster", [True, False])
def test_auto_is_the_format_that_is_faster_and_loses_nothing(is_faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "prefers_bf16", lambda: is_faster)
    for stored in (torch.bfloat16, torch.float32, torch.float16, None):
        is_bf16 = is_faster and stored == torch.bfloat16
        assert pick_dtype("auto", CPU, stored) == (torch.bfloat16 if is_bf16 else torch.float32)
        assert pick_dtype("auto", torch.device("cuda"), stored) == torch.bfloat16
        for name in ("bfloat16", "float32"):
            assert pick_dtype(name, CPU, stored) == getattr(torch, name)
    assert pick_dtype("float16", torch.device("cuda"), None) == torch.float16
    with pytest.raises(UnsupportedModelError, match="--dtype float32"):
        pick_dtype("float16", CPU, None)


@pytest.mark.parametrize(
    ("instructions", "is_amd", "has_tiles", "expected"),
    [
        ({"avx512_bf16"}, True, False, True),
        ({"avx512_bf16"}, False, False, False),
        ({"avx512_bf16", "amx_bf16"}, False, True, True),
        ({"avx512_bf16", "amx_bf16"}, False, False, False),  # Linux does not give the registers
        ({"avx2"}, True, False, False),
    ],
)
def test_bfloat16_is_preferred_where_its_products_are_faster(
    instructions: set[str], is_amd: bool, has_tiles: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "processor_instructions", lambda: frozenset(instructions))
    monkeypatch.setattr(build, "is_amd", lambda: is_amd)
    monkeypatch.setattr(build, "variant", lambda: build.Variant(16, has_tiles, is_plain=False))
    assert prefers_bf16() == expected


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma2", "gpt_neox", "gpt2"])
def test_products_of_bfloat16_pass_the_proof_and_no_other_product_does(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save_tiny_base(tmp_path, {"model_type": model_type, **ARCHITECTURES[model_type]})
    backend = pick_backend(CPU, torch.bfloat16, KERNEL_CACHE, lambda _message: None)
    assert load(folder, backend).layers.linears
    monkeypatch.setattr(
        cpu_linear.CpuLinear, "forward", lambda self, x: 1.1 * nn.functional.linear(x, self.dense(), self.bias)
    )
    with pytest.raises(UnsupportedModelError, match="something else"):
        load(folder, backend)


def test_a_model_with_rows_that_native_kernels_do_not_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="rows of float32"):
        load(tiny.save_tiny_base(tmp_path), CPU_BACKEND, torch.bfloat16)


def test_a_gpu_attends_without_plans_for_each_length() -> None:
    def makes_plans() -> bool:
        return bool(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]

    before = makes_plans()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        torch_backend(CPU)
        assert makes_plans()
        torch_backend(torch.device("cuda"))
        assert not makes_plans()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
