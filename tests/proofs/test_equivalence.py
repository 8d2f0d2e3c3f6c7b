"""The proof of the product: base and adapters of every shape in one batch, each row what PEFT gives alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import tiny
from oracle import Oracle
from serving import BASE, Running, serving, settings
from sixteen_adapters import MAX_TOKENS, SHAPES, TOLERANCE, error_against, prompt_of, stream_all


@pytest.fixture(scope="module")
def sixteen(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sixteen")
    return [tiny.save_adapter(folder / f"s{n}", base, seed=100 + n, **shape) for n, shape in enumerate(SHAPES)]


@pytest.fixture(scope="module")
def loaded(server: Running, sixteen: list[Path]) -> Running:
    for folder in sixteen:
        assert server.put(folder.name, folder).status_code == 201
    return server


async def test_seventeen_streams_at_once_equal_peft_alone(loaded: Running, base: Path, sixteen: list[Path]) -> None:
    names = [BASE, *(folder.name for folder in sixteen)]
    answers = await stream_all(loaded, names)
    for name, said, folder in zip(names, answers, [None, *sixteen], strict=True):
        oracle = Oracle(base, folder)
        assert len(said.token_ids) == MAX_TOKENS
        assert error_against(oracle, name, said) <= TOLERANCE, name
        assert oracle.is_greedy(prompt_of(name), said.token_ids, tie=2 * TOLERANCE), name
        assert said.headers.get("x-swaplora-adapter") == (None if folder is None else f"{name}@1")


async def test_every_adapter_moves_the_output(loaded: Running, base: Path, sixteen: list[Path]) -> None:
    plain = Oracle(base)
    answers = await stream_all(loaded, [folder.name for folder in sixteen])
    moved = [error_against(plain, folder.name, said) for folder, said in zip(sixteen, answers, strict=True)]
    assert min(moved) > 100 * TOLERANCE
    assert max(moved) > 0.5


def scale_dropped(folder: Path) -> None:
    tiny.edit_config(folder, lora_alpha=json.loads((folder / "adapter_config.json").read_text())["r"])


def rslora_ignored(folder: Path) -> None:
    tiny.edit_config(folder, use_rslora=True)


def one_layer_missing(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: t * 0 if "layers.0" in name and "lora_B" in name else t for name, t in tensors.items()}, path)


def neighbours_weights(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: t.flip(0) for name, t in tensors.items()}, path)


@pytest.mark.parametrize("fault", [scale_dropped, rslora_ignored, one_layer_missing, neighbours_weights])
async def test_the_comparison_fails_when_something_is_wrong(
    fault: Any, server: Running, base: Path, tmp_path: Path
) -> None:
    right = tiny.save_adapter(tmp_path / "right", base, seed=5, rank=8)
    wrong = tiny.save_adapter(tmp_path / "wrong", base, seed=5, rank=8)
    fault(wrong)
    server.put("control", right)
    (said,) = await stream_all(server, ["control"])
    assert error_against(Oracle(base, right), "control", said) <= TOLERANCE
    assert error_against(Oracle(base, wrong), "control", said) > TOLERANCE


async def test_n_continuations_of_an_adapter_are_each_its_own(loaded: Running, base: Path, sixteen: list[Path]) -> None:
    name = sixteen[-2].name
    body = {"model": name, "prompt": prompt_of(name), "max_tokens": MAX_TOKENS, "temperature": 0, "n": 3}
    choices = loaded.client.post("/v1/completions", json=body | {"return_token_ids": True}).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    oracle = Oracle(base, sixteen[-2])
    assert all(oracle.is_greedy(prompt_of(name), choice["token_ids"], tie=2 * TOLERANCE) for choice in choices)


@pytest.mark.parametrize("max_batch_tokens", [3, 7, 64])
async def test_chunked_prefill_and_preemption_change_nothing(
    max_batch_tokens: int, base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    limits = {"max_batch_tokens": max_batch_tokens, "max_num_seqs": 3, "kv_cache_bytes": 48 << 10, "block_size": 4}
    config = settings(base, tmp_path, **limits)
    with serving(config) as small:
        for folder in adapters[:4]:
            assert small.put(folder.name, folder).status_code == 201
        names = [BASE, *(folder.name for folder in adapters[:4])]
        answers = await stream_all(small, names)
        oracles = [Oracle(base), *(Oracle(base, folder) for folder in adapters[:4])]
        for name, said, oracle in zip(names, answers, oracles, strict=True):
            assert error_against(oracle, name, said) <= TOLERANCE, name
