"""Inspection: what PEFT saves is let in and described, what is wrong is told all at once."""

import hashlib
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from adapter_files import LAYERS, factors, write_adapter
from swaplora_adapters.errors import InvalidAdapterError, UnsupportedAdapterError
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.files.tensorfile import Limits
from swaplora_adapters.intake import Inspection, inspect_files


def inspect(folder: Path, **options: Any) -> Inspection:
    return inspect_files(folder / CONFIG_FILE, folder / WEIGHTS_FILE, LAYERS, **options)


def reasons(folder: Path, error: type[InvalidAdapterError] = InvalidAdapterError, **options: Any) -> tuple[str, ...]:
    with pytest.raises(InvalidAdapterError) as caught:
        inspect(folder, **options)
    assert caught.type is error
    assert str(folder) not in str(caught.value)
    return caught.value.reasons


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": ["q_proj"], "rank": 8, "use_rslora": True},
        {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"q_proj": 2}},
        {"target_modules": ["up_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=["all", "rslora", "patterns", "layers", "excluded", "gaussian", "orthogonal"],
)
def test_what_peft_saves_is_let_in(tmp_path: Path, base: Path, fields: dict[str, Any]) -> None:
    details = inspect(tiny.save_adapter(tmp_path, base, seed=1, **fields)).details
    assert details.base_model == str(base)
    assert details.warnings == ()
    assert details.rank == max([fields.get("rank", 4), *fields.get("rank_pattern", {}).values()])
    assert details.targets == tuple(sorted(fields.get("target_modules", tiny.ALL_LINEAR)))


def test_what_peft_saves_but_is_not_served_is_named(tmp_path: Path, base: Path) -> None:
    folder = tiny.save_adapter(tmp_path, base, seed=1, target_modules=["q_proj"], init_lora_weights="pissa")
    assert any("init_lora_weights" in reason for reason in reasons(folder, UnsupportedAdapterError))


def test_an_adapter_saved_without_a_task_is_let_in(tmp_path: Path, base: Path) -> None:
    folder = tiny.save_adapter(tmp_path, base, seed=1)
    tiny.edit_config(folder, task_type=None, auto_mapping={"base_model_class": "LlamaForCausalLM"})
    assert inspect(folder).spec.task_type is None


def test_digest_is_over_framed_canonical_config_and_weights(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    inspection = inspect(folder)
    weights = (folder / WEIGHTS_FILE).read_bytes()
    parts = (inspection.spec.canonical, weights)
    framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    assert inspection.digest == "sha256:" + hashlib.sha256(framed).hexdigest()


def test_digest_follows_the_meaning(tmp_path: Path) -> None:
    digest = inspect(write_adapter(tmp_path / "a")).digest
    assert inspect(write_adapter(tmp_path / "b", lora_dropout=0.5, base_model_name_or_path="x")).digest == digest
    assert inspect(write_adapter(tmp_path / "c", lora_alpha=10)).digest != digest
    assert inspect(write_adapter(tmp_path / "d", seed=1)).digest != digest


def test_both_files_are_complained_about_at_once(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, r=0)
    (folder / WEIGHTS_FILE).write_bytes(b"junk")
    config, weights = reasons(folder)
    assert config.startswith("r must be")
    assert weights.startswith("adapter_model.safetensors: the file has 4 bytes")


def test_something_malformed_outweighs_something_unsupported(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, layer_replication=[[0, 1]])
    reasons(folder, UnsupportedAdapterError)
    (folder / WEIGHTS_FILE).write_bytes(b"junk")
    assert len(reasons(folder)) == 2


def test_missing_files(tmp_path: Path) -> None:
    assert reasons(tmp_path) == ("adapter_config.json is missing", "adapter_model.safetensors is missing")


def test_a_large_config_is_not_read(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    with (folder / CONFIG_FILE).open("r+b") as file:
        file.truncate(50 << 20)
    assert reasons(folder) == ("adapter_config.json is larger than 1048576 bytes",)


def test_fit_and_values_are_checked(tmp_path: Path) -> None:
    assert "is targeted, but not in the file" in reasons(write_adapter(tmp_path / "a", target_modules=["k_proj"]))[-1]
    broken = {name: tensor * float("inf") for name, tensor in factors().items()}
    assert len(reasons(write_adapter(tmp_path / "b", broken))) == 8
    large = {name: tensor * 1e4 for name, tensor in factors().items()}
    folder = write_adapter(tmp_path / "c", large, lora_alpha=1000)
    inspect(folder)
    assert "overflows float16" in reasons(folder, dtype=torch.float16)[0]


def test_limits_are_kept(tmp_path: Path) -> None:
    assert "more than 3" in reasons(write_adapter(tmp_path), limits=Limits(max_tensors=3))[0]


def test_warnings(tmp_path: Path) -> None:
    zero = {name: tensor * ("lora_A" in name) for name, tensor in factors().items()}
    folder = write_adapter(tmp_path, zero, base_model_name_or_path="org/one")
    assert inspect(folder, base_model="org/two").details.warnings == (
        "made for the base model 'org/one', not org/two; its shapes fit",
        "every lora_B is zero: the adapter changes nothing",
    )
    assert inspect(write_adapter(tmp_path), base_model="org/two").details.warnings == ()


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / "snapshot" / name).symlink_to(folder / name)
    assert inspect(tmp_path / "snapshot").digest == inspect(folder).digest


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_damage_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = write_adapter(tmp_path_factory.getbasetemp() / "damaged")
    name = data.draw(st.sampled_from([CONFIG_FILE, WEIGHTS_FILE]))
    content = bytearray((folder / name).read_bytes())
    start = data.draw(st.integers(0, min(len(content), 1500) - 1))
    content[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    (folder / name).write_bytes(content)
    started = time.thread_time()
    try:
        inspection = inspect(folder)
        text = str(inspection.details)
    except InvalidAdapterError as error:
        text = str(error)
    assert str(folder) not in text
    assert time.thread_time() - started < 1
