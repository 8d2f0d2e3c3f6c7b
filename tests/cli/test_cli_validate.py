"""`swaplora adapters validate` says of a folder what a server of the same base says of its upload."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import Result

import tiny
from adapter_files import factors, write_adapter
from fake_server import swaplora
from serving import BASE, Running, settings


@pytest.fixture
def validate(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """The command with the settings of the tests' server, given as the environment gives them."""
    of_server = settings(base, tmp_path)
    for name in ("served_model_name", "dtype", "device", "cache_dir", "log_level"):
        monkeypatch.setenv(f"SWAPLORA_{name.upper()}", str(getattr(of_server, name)))
    yield lambda folder, *args: swaplora("adapters", "validate", str(folder), "--base", str(base), *args)
    structlog.reset_defaults()  # its logger writes to the stderr of one run of the command


def test_a_sound_adapter_is_described_as_its_card_would(
    server: Running, validate: Callable[..., Result], adapters: list[Path]
) -> None:
    card = server.put("sound", adapters[3]).json()
    found = json.loads(validate(adapters[3], "--json").stdout)
    assert found.pop("valid") is True
    assert found == {key: card[key] for key in found}
    assert found.keys() == {"base", "digest", "kind", "rank", "targets", "parameters", "warnings"}


def test_a_sound_adapter_is_one_line(validate: Callable[..., Result], tmp_path: Path) -> None:
    done = validate(write_adapter(tmp_path / "sound"))
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("sha256:")
    assert done.stdout.endswith(f" fits {BASE}: rank 4 on q_proj, v_proj; 896 parameters\n")
    assert done.stdout.count("\n") == 1


def test_warnings_are_told_as_the_server_tells_them(
    server: Running, validate: Callable[..., Result], tmp_path: Path
) -> None:
    zero = {name: tensor * ("lora_A" in name) for name, tensor in factors().items()}
    folder = write_adapter(tmp_path / "zero", zero, base_model_name_or_path="org/other")
    warnings = server.put("zero", folder).json()["warnings"]
    assert len(warnings) == 2
    done = validate(folder)
    assert (done.exit_code, done.stdout.splitlines()[1:]) == (0, [f"warning: {warning}" for warning in warnings])


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({"layer_replication": [[0, 1]], "task_type": "SEQ_2_SEQ_LM"}, 1.0),
        ({"r": 0, "lora_alpha": "much"}, 1.0),
        ({"target_modules": ["q_proj", "k_proj"]}, 1.0),
        ({}, float("nan")),
    ],
    ids=["unsupported", "malformed", "unfit", "not finite"],
)
def test_a_refusal_is_the_server_s_with_a_line_for_each_reason(
    server: Running, validate: Callable[..., Result], tmp_path: Path, fields: dict[str, Any], factor: float
) -> None:
    tensors = {name: tensor * factor for name, tensor in factors().items()}
    folder = write_adapter(tmp_path / "broken", tensors, **fields)
    error = server.put("broken", folder).json()["error"]
    done = validate(folder, "--json")
    told = done.stdout[done.stdout.index("{\n") :]  # after a line of the server on what it refused, if there is one
    answer, _ = json.JSONDecoder().raw_decode(told)
    assert (done.exit_code, answer["valid"], answer["code"]) == (1, False, error["code"])
    assert "; ".join(answer["reasons"]) == error["message"]
    assert len(answer["reasons"]) > 1
    plain = validate(folder)
    assert (plain.exit_code, plain.stdout) == (1, "")
    lines = [line for line in plain.stderr.splitlines() if line.startswith("swaplora: ")]
    assert lines == [f"swaplora: {reason}" for reason in answer["reasons"]]


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ("MAX_ADAPTER_BYTES", "adapter_model.safetensors is larger than 1000 bytes"),
        ("ADAPTER_MEMORY_BYTES", "adapter_model.safetensors needs 3584 bytes of memory, and all adapters have 1000"),
    ],
)
def test_the_server_s_limits_hold(
    validate: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, reason: str
) -> None:
    folder = write_adapter(tmp_path / "large")
    assert validate(folder).exit_code == 0
    monkeypatch.setenv(f"SWAPLORA_{limit}", "1000")
    done = validate(folder, "--json")
    assert (done.exit_code, json.loads(done.stdout)) == (
        1,
        {"valid": False, "code": "adapter_too_large", "reasons": [reason]},
    )


def test_a_folder_that_is_no_adapter_is_refused_before_the_base_is_loaded(tmp_path: Path) -> None:
    done = swaplora("adapters", "validate", str(tmp_path), "--base", "/nowhere")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == (
        f"swaplora: {tmp_path} has no adapter_config.json: give the folder that PEFT's save_pretrained wrote\n"
    )


def test_a_base_that_cannot_be_loaded_is_one_line(validate: Callable[..., Result], tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "sound")
    nothing = tmp_path / "nothing"
    done = swaplora("adapters", "validate", str(folder), "--base", str(nothing))
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == f"swaplora: {nothing} is no folder: name a folder with a model, a hub id, or embedded\n"
    nothing.mkdir()
    done = swaplora("adapters", "validate", str(folder), "--base", str(nothing))
    assert done.exit_code == 1
    steps, complaint = done.stderr.splitlines()
    assert steps == "loading base"
    assert complaint.startswith(f"swaplora: Unrecognized model in {nothing}")


def test_the_base_of_another_model_is_told_apart(
    validate: Callable[..., Result], tmp_path: Path, adapters: list[Path]
) -> None:
    wide = tiny.save_tiny_base(tmp_path / "wide", {**tiny.LLAMA, "hidden_size": 64})
    assert validate(adapters[0]).exit_code == 0
    done = swaplora("adapters", "validate", str(adapters[0]), "--base", str(wide), "--json")
    assert (done.exit_code, json.loads(done.stdout)["code"]) == (1, "invalid_adapter")
