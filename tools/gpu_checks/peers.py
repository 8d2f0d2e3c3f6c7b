"""Others on the same card and shape: transformers' generate and its continuous batching, PEFT, and our torch form."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, PreTrainedModel

import tiny
from gpu_checks.card import Card
from gpu_checks.models import RANK, prompt, random_adapter, random_base, random_model
from gpu_checks.report import Report
from gpu_checks.steps import stepper_for
from swaplora_server.kernels.pick import torch_backend

NUM_TIMED = 8


def measure_peers(report: Report, card: Card, shape: str) -> dict[str, Any]:
    """Milliseconds a decoding step, from answers of two lengths."""
    context = 24 if card.is_dry else 512
    torch.backends.cuda.enable_cudnn_sdp(True)  # as torch and they have it
    figures = _transformers(card, shape, context)
    if card.is_gpu:  # on a CPU it takes ten seconds to begin
        try:
            figures |= _continuous_batching(card, shape, context)
        except Exception as error:  # noqa: BLE001 - a peer that fails is no fault of ours
            report.finding(f"transformers' continuous batching: {type(error).__name__}: {error}"[:300])
    card.free()
    figures |= _peft(card, shape, context)
    torch.backends.cuda.enable_cudnn_sdp(False)
    card.free()
    figures |= _torch_form(card, shape, context)
    for label, seconds in figures.items():
        report.row(f"{shape} step of {label} (rows x adapters)", f"{seconds * 1e3:.2f} ms")
    return figures


def _transformers(card: Card, shape: str, context: int) -> dict[str, float]:
    model = random_model(shape, card, torch.bfloat16, attention="sdpa")
    return {
        f"transformers {num_rows}x0": _step_seconds(
            card, partial(_generate, model, _prompts(card, model, num_rows, context))
        )
        for num_rows in ((1, 2) if card.is_dry else (1, 16, 64))
    }


def _continuous_batching(card: Card, shape: str, context: int) -> dict[str, float]:
    model = random_model(shape, card, torch.bfloat16, attention="sdpa")
    return {
        f"transformers' continuous batching {num_rows}x0": _step_seconds(
            card, partial(_generate_continuously, model, _prompts(card, model, num_rows, context))
        )
        for num_rows in (16, 64)
    }


def _peft(card: Card, shape: str, context: int) -> dict[str, float]:
    """With as many adapters as rows."""
    model = random_model(shape, card, torch.bfloat16, attention="sdpa")
    names = [f"a{number}" for number in range(2 if card.is_dry else 16)]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(tiny.ALL_LINEAR), init_lora_weights=False)
    with card.device:
        peft = get_peft_model(model, config, names[0], autocast_adapter_dtype=False)
        for name in names[1:]:
            peft.add_adapter(name, config)
    peft.eval()
    ids = _prompts(card, model, len(names), context)
    told = f"PEFT {len(names)}x{len(names)}"
    return {told: _step_seconds(card, partial(_generate, peft, ids, adapter_names=names))}


def _torch_form(card: Card, shape: str, context: int) -> dict[str, float]:
    """Seconds of our own step by torch's operations alone."""
    base = random_base(shape, card, torch.bfloat16, torch_backend(card.device))
    figures = {}
    for num_rows in (2,) if card.is_dry else (16, 64):
        stepper = stepper_for(base, num_rows, context)
        for row in range(num_rows):
            stepper.add(prompt(row, context, base.vocab_size), [random_adapter(base, row)])
        stepper.decode()
        stepper.times(2)
        figures[f"ours, torch's operations {num_rows}x{num_rows}"] = median(stepper.times(4))
    return figures


def _prompts(card: Card, model: PreTrainedModel, num_rows: int, context: int) -> torch.Tensor:
    vocab_size = model.config.vocab_size
    return torch.tensor([prompt(row, context, vocab_size) for row in range(num_rows)], device=card.device)


def _step_seconds(card: Card, generate: Callable[[int], object]) -> float:
    """From answers of two lengths; the first one warms up."""
    times = []
    for length in (2, 2, 2 + NUM_TIMED):
        card.wait()
        began = time.perf_counter()
        generate(length)
        card.wait()
        times.append(time.perf_counter() - began)
    return (times[2] - times[1]) / NUM_TIMED


@torch.inference_mode()
def _generate(model: Any, ids: torch.Tensor, length: int, **options: Any) -> None:
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=False,
        pad_token_id=tiny.PAD,
        **options,
    )


def _generate_continuously(model: Any, ids: torch.Tensor, length: int) -> None:
    """Raises ValueError where it answers in another number of tokens."""
    config = GenerationConfig(max_new_tokens=length, do_sample=False, pad_token_id=tiny.PAD, eos_token_id=-1)
    answers: Any = model.generate_batch(inputs=ids.tolist(), generation_config=config, progress_bar=False)
    lengths = {len(answer.generated_tokens) for answer in answers.values()}
    if len(answers) != len(ids) or lengths != {length}:
        raise ValueError(
            f"{len(answers)} answers of {lengths} tokens to {len(ids)} prompts, {length} tokens were asked"
        )
