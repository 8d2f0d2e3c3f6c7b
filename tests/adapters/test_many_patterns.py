"""An adapter with a pattern for every module, once it is taken in, loads for ever: after others, and restarted."""

from pathlib import Path

import pytest

import tiny
from oracle import Oracle
from serving import Running, serving, settings

# of PEFT's
pytestmark = pytest.mark.filterwarnings("ignore")
FIELDS = {**tiny.LLAMA, "num_hidden_layers": 4}


def test_what_was_acknowledged_loads_for_ever(tmp_path: Path) -> None:
    base = tiny.save_tiny_base(tmp_path / "base", FIELDS)
    ranks = {f"^{path}$": 2 + index % 3 for index, path in enumerate(_paths())}
    alphas = {f"^{path.replace('.', chr(92) + '.')}": 3 + index % 5 for index, path in enumerate(_paths())}
    folder = tiny.save_adapter(tmp_path / "a", base, seed=1, rank_pattern=ranks, alpha_pattern=alphas)
    other = tiny.save_adapter(tmp_path / "b", base, seed=2)
    nbytes = (folder / "adapter_model.safetensors").stat().st_size
    config = settings(base, tmp_path / "data", adapter_memory_bytes=nbytes * 3 // 2)
    with serving(config) as running:
        assert running.put("patterns", folder).status_code == 201
        assert running.put("other", other).status_code == 201
        for _ in range(5):
            assert running.client.post("/v1/adapters/other/warm").status_code == 200
            assert running.client.post("/v1/adapters/patterns/warm").status_code == 200
        check(running, base, folder)
    with serving(config) as running:
        check(running, base, folder)


def check(running: Running, base: Path, folder: Path) -> None:
    body = {"model": "patterns", "messages": [{"role": "user", "content": "Hello there"}], "temperature": 0}
    options = {"max_tokens": 8, "logprobs": True, "return_token_ids": True, "ignore_eos": True}
    choice = running.client.post("/v1/chat/completions", json=body | options).json()["choices"][0]
    said = (
        choice["prompt_token_ids"],
        choice["token_ids"],
        [token["logprob"] for token in choice["logprobs"]["content"]],
    )
    assert Oracle(base, folder).worst_error(*said) < 1e-4
    assert Oracle(base).worst_error(*said) > 0.5


def _paths() -> list[str]:
    names = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    return [f"model.layers.{layer}.{name}" for layer in range(4) for name in names]
