"""Bases of 8 and 4 bits on the card: what PEFT gives on the same quantised base, and what is left of their bytes."""

from pathlib import Path
from typing import Any, get_args

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import is_bitsandbytes_available

import tiny
from gpu_checks.card import Card
from gpu_checks.report import Report
from gpu_checks.served import load_adapter, logprobs_together
from swaplora_server.base.base_model import BaseModel, load_base
from swaplora_server.base.quantisation import (
    Quantization,
    loading_arguments,
    multiply_bytes_dequantised,
    multiply_dequantised,
)

SHAPE = {**tiny.LLAMA, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
RANKS = (1, 8, 64)
TOLERANCE = 5e-3  # of a log-probability: the same products in the same number format, others around them


def compare_quantised(report: Report, card: Card, scratch: Path) -> dict[str, Any]:
    """Steps on a base of 8 and of 4 bits, their rows in fp32, and memory of the base."""
    if not is_bitsandbytes_available():
        report.finding("quantised bases are not checked: bitsandbytes is not installed")
        return {}
    folder = tiny.save_tiny_base(scratch / "quantised", SHAPE)
    made = [tiny.save_adapter(scratch / f"quantised-{rank}", folder, seed=rank, rank=rank) for rank in RANKS]
    plain = _load(card, folder, None).weight_bytes
    figures: dict[str, Any] = {}
    for quantization in get_args(Quantization):
        figures[quantization] = told = _compared(card, folder, made, quantization)
        for how in ("alone", "together"):
            report.check(told[how] <= TOLERANCE, f"{quantization} {how}: off from PEFT on that base by {told[how]:.1e}")
        report.row(
            f"{quantization} base against PEFT on the same, fp32",
            f"off by {told['alone']:.1e} alone, {told['together']:.1e} in a mixed step",
        )
        report.row(f"{quantization} base, bytes of its weights", f"{told['bytes'] / plain:.2f} of fp32's")
    return figures


def _load(card: Card, folder: Path, quantization: Quantization | None) -> BaseModel:
    backend = card.backend(torch.float32)
    return load_base(folder, device=card.device, dtype=torch.float32, backend=backend, quantization=quantization)


def _compared(card: Card, folder: Path, adapters: list[Path], quantization: Quantization) -> dict[str, Any]:
    tokens = [(11 * position + 5) % 250 for position in range(60)]
    base = _load(card, folder, quantization)
    loaded = [None, *(load_adapter(base, adapter) for adapter in adapters)]
    expected = [_peft(card, folder, adapter, quantization, tokens) for adapter in (None, *adapters)]

    def off(ours: list[Tensor]) -> float:
        return max(float((own - exact).abs().max()) for own, exact in zip(ours, expected, strict=True))

    return {
        "alone": off([logprobs_together(base, tokens, [weights])[0] for weights in loaded]),
        "together": off(logprobs_together(base, tokens, loaded)),
        "bytes": base.weight_bytes,
    }


@torch.no_grad()
def _peft(card: Card, folder: Path, adapter: Path | None, quantization: Quantization, tokens: list[int]) -> Tensor:
    """[vocab_size], on the CPU: the log-distribution of the token behind `tokens`."""
    arguments = loading_arguments(AutoConfig.from_pretrained(folder), quantization, card.device, torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **arguments
    )
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    (multiply_bytes_dequantised if card.is_gpu else multiply_dequantised)(model)  # as the server does on it
    logits: Tensor = model(torch.tensor([tokens], device=card.device)).logits[0, -1]
    return logits.float().log_softmax(-1).cpu()
