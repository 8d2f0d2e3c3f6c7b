"""Others on the same card and shape: transformers' own generate, and PEFT's `adapter_names`."""

import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

import tiny
from gpu_checks.card import Card
from gpu_checks.models import RANK, prompt, random_model
from gpu_checks.report import Report

NUM_TIMED = 8


def measure_peers(report: Report, card: Card, shape: str) -> dict[str, Any]:
    """Milliseconds a decoding step, from answers of two lengths."""
    context = 24 if card.is_dry else 512
    torch.backends.cuda.enable_cudnn_sdp(True)  # as torch and they have it
    model = random_model(shape, card, torch.bfloat16, attention="sdpa")
    figures = {}
    for num_rows in (1, 2) if card.is_dry else (1, 16, 64):
        figures[f"transformers {num_rows}x0"] = _step_seconds(card, model, num_rows, context)
    num_adapters = 2 if card.is_dry else 16
    names = [f"a{number}" for number in range(num_adapters)]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(tiny.ALL_LINEAR), init_lora_weights=False)
    began = time.perf_counter()
    with card.device:
        peft = get_peft_model(model, config, names[0], autocast_adapter_dtype=False)
        for name in names[1:]:
            peft.add_adapter(name, config)
    peft.eval()
    figures["seconds to make PEFT's adapters"] = time.perf_counter() - began
    figures[f"PEFT {num_adapters}x{num_adapters}"] = _step_seconds(
        card, peft, num_adapters, context, adapter_names=names
    )
    for label, seconds in figures.items():
        if "seconds" not in label:
            report.row(f"{shape} step of {label} (rows x adapters)", f"{seconds * 1e3:.2f} ms")
    return figures


@torch.inference_mode()
def _step_seconds(card: Card, model: PreTrainedModel, num_rows: int, context: int, **options: Any) -> float:
    vocab_size = model.config.vocab_size
    ids = torch.tensor([prompt(row, context, vocab_size) for row in range(num_rows)], device=card.device)
    times = []
    for length in (2, 2, 2 + NUM_TIMED):  # the first warms up
        card.wait()
        began = time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            pad_token_id=tiny.PAD,
            **options,
        )
        card.wait()
        times.append(time.perf_counter() - began)
    return (times[2] - times[1]) / NUM_TIMED
