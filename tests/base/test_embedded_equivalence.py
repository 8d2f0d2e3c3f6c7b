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
NAMES = [f"s{number}" for number in range(len(SHAPES))]


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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sixteen are saved, each in a folder of its name."""
    return tmp_path_factory.mktemp("sixteen")


@pytest.fixture(scope="module")
def tuned(base: Path, folder: Path) -> PeftModel:
    """The stock model in float32, and sixteen adapters on it, one of which is active at a time."""
    tuned: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for number, shape in enumerate(SHAPES):
        config = config_of(**shape)
        if number == 0:
            tuned = get_peft_model(tuned, config, NAMES[0])
        else:
            tuned.add_adapter(NAMES[number], config)
        fill(tuned, number)
    tuned.save_pretrained(folder)
    return tuned.eval()


def config_of(rank: int, alpha: float | None = None, **fields: Any) -> LoraConfig:
    targets = fields.pop(
        "target_modules", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    fields.pop("layers_to_transform", None)
    if "rank_pattern" in fields:
        fields["rank_pattern"] = {name: r for name, r in fields["rank_pattern"].items() if "layers" not in name}
    return LoraConfig(r=rank, lora_alpha=2 * rank if alpha is None else alpha, target_modules=list(targets), **fields)


def fill(tuned: PeftModel, number: int) -> None:
    """Seeded values, strong enough that they change what is said."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if f".{NAMES[number]}." in name:
                strength = 0.05 / SHAPES[number]["rank"] ** 0.5 if "lora_B" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * strength)


def worst_error(tuned: Any, prompt: list[int], said: Streamed) -> tuple[float, float]:
    """(the largest |Δ logprob| of what was said, by how much the likeliest token was missed), teacher-forced."""
    with torch.no_grad():
        logits = tuned(torch.tensor([prompt + said.token_ids])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    chosen = expected[torch.arange(len(said.token_ids)), torch.tensor(said.token_ids)]
    return float((chosen - torch.tensor(said.logprobs)).abs().max()), float((expected.max(-1).values - chosen).max())


async def test_seventeen_streams_at_once_equal_peft_alone(
    base: Path, tuned: PeftModel, folder: Path, tmp_path: Path
) -> None:
    with serving(settings(base, tmp_path, kv_cache_bytes=256 << 20)) as server:
        for name in NAMES:
            assert server.put(name, folder / name).status_code == 201
        plain, *answers = await stream_all(server, [BASE, *NAMES])
        prompts = {name: prompt_of(server, name) for name in (BASE, *NAMES)}
    with tuned.disable_adapter():
        assert max(worst_error(tuned, prompts[BASE], plain)) <= TOLERANCE
        moved = any(worst_error(tuned, prompts[name], said)[0] > 0.5 for name, said in zip(NAMES, answers, strict=True))
    assert moved, "the adapters change nothing, so this shows nothing"
    for name, said in zip(NAMES, answers, strict=True):
        tuned.set_adapter(name)
        error, missed = worst_error(tuned, prompts[name], said)
        assert error <= TOLERANCE, name
        assert missed <= 2 * TOLERANCE, name


def prompt_of(server: Running, name: str) -> list[int]:
    tokenizer = server.service.base.tokenizer
    messages = [{"role": "user", "content": f"question {name}"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))
