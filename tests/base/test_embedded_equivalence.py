"""The proof of equivalence on the real thing: base and sixteen adapters at once on the embedded model, against PEFT."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from repository import ROOT
from serving import BASE, Running, Streamed, serving, settings
from sixteen_adapters import SHAPES, stream_all
from swaplora_server.embedded import ensure_embedded_base

TOLERANCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On a base of this size threads share the work, and on a busy machine spend more time waiting for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base() -> Path:
    return ensure_embedded_base(ROOT / ".cache", lambda _message: None)


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    """The stock model in float32: PEFT's adapters are put on it one at a time."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def sixteen(model: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sixteen")
    return [save(model, folder / f"s{number}", number, **shape) for number, shape in enumerate(SHAPES)]


def save(model: Any, folder: Path, seed: int, rank: int, alpha: float | None = None, **fields: Any) -> Path:
    """An adapter made by PEFT with seeded values, strong enough that it changes what is said."""
    targets = fields.pop(
        "target_modules", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    fields.pop("layers_to_transform", None)
    if "rank_pattern" in fields:
        fields["rank_pattern"] = {name: r for name, r in fields["rank_pattern"].items() if "layers" not in name}
    config = LoraConfig(r=rank, lora_alpha=2 * rank if alpha is None else alpha, target_modules=list(targets), **fields)
    tuned = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                strength = 0.05 / rank**0.5 if "lora_B" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * strength)
    tuned.save_pretrained(folder)
    tuned.unload()
    return folder


def worst_error(tuned: Any, prompt: list[int], said: Streamed) -> tuple[float, float]:
    """(the largest |Δ logprob| of what was said, by how much the likeliest token was missed), teacher-forced."""
    with torch.no_grad():
        logits = tuned(torch.tensor([prompt + said.token_ids])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    chosen = expected[torch.arange(len(said.token_ids)), torch.tensor(said.token_ids)]
    return float((chosen - torch.tensor(said.logprobs)).abs().max()), float((expected.max(-1).values - chosen).max())


async def test_seventeen_streams_at_once_equal_peft_alone(
    base: Path, model: Any, sixteen: list[Path], tmp_path: Path
) -> None:
    with serving(settings(base, tmp_path, kv_cache_bytes=256 << 20)) as server:
        for folder in sixteen:
            assert server.put(folder.name, folder).status_code == 201
        names = [BASE, *(folder.name for folder in sixteen)]
        answers = await stream_all(server, names)
        prompts = {name: prompt_of(server, name) for name in names}
    plain = answers[0]
    assert max(worst_error(model, prompts[BASE], plain)) <= TOLERANCE
    moved = []
    for name, folder, said in zip(names[1:], sixteen, answers[1:], strict=True):
        moved.append(worst_error(model, prompts[name], said)[0])
        tuned = PeftModel.from_pretrained(model, str(folder)).eval()
        error, missed = worst_error(tuned, prompts[name], said)
        tuned.unload()
        assert error <= TOLERANCE, name
        assert missed <= 2 * TOLERANCE, name
    assert max(moved) > 0.5, "the adapters change nothing, so this shows nothing"


def prompt_of(server: Running, name: str) -> list[int]:
    tokenizer = server.service.base.tokenizer
    messages = [{"role": "user", "content": f"question {name}"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))
