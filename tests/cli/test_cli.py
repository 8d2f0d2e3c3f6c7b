"""`swaplora serve` and `--help`: flags become settings, and nothing slow is imported for them. The banner."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

import swaplora_server
from fake_server import swaplora
from swaplora_server.banner import Progress, human_bytes, show_banner
from swaplora_server.config import Settings

RUN = "from swaplora_server.cli import main; main()"
COMMANDS = (
    "",
    "chat",
    "bench",
    "adapters",
    *(f"adapters {name}" for name in ("list", "get", "put", "delete", "rollback", "pin", "unpin", "warm", "inspect")),
    "adapters compose",
    "aliases",
    *(f"aliases {name}" for name in ("list", "set", "delete")),
)
TAKE_SETTINGS = ("serve", "merge", "extract", "doctor", "adapters validate")
NEVER = frozenset({"torch", "transformers", "fastapi", "numpy", "httpx"})
OF_SETTINGS = frozenset({"pydantic_settings", "swaplora_server.config"})


class StartError(RuntimeError):
    """What the stand-in for the server raises."""


def replace_server(monkeypatch: pytest.MonkeyPatch, run: Callable[[Settings], None]) -> None:
    """Put `run` in the place of the real server, which imports torch."""
    module = ModuleType("swaplora_server.serve")
    monkeypatch.setattr(module, "run", run, raising=False)
    monkeypatch.setattr(module, "StartError", StartError, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """What `serve` started a server with."""
    settings: list[Settings] = []
    replace_server(monkeypatch, settings.append)
    return settings


@pytest.mark.parametrize(
    ("command", "slow"),
    [
        *((command, NEVER | OF_SETTINGS) for command in COMMANDS),
        *((command, NEVER) for command in (*TAKE_SETTINGS, "train")),
    ],
)
def test_help_imports_nothing_slow(command: str, slow: frozenset[str]) -> None:
    report = f"print(*({set(slow)} & sys.modules.keys()), file=sys.stderr)"
    code = f"import atexit, sys; atexit.register(lambda: {report}); {RUN}"
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split(), "--help"],
        cwd=Path(swaplora_server.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Usage:" in done.stdout
    assert done.stderr == "\n"


def test_serve_hands_its_flags_to_the_server(started: list[Settings], tmp_path: Path) -> None:
    done = swaplora(
        *("serve", "org/model", "--port", "0", "--device", "cpu", "--kv-cache-bytes", "2GiB", "--log-json"),
        *("--adapter", f"a={tmp_path}", "--adapter", f"b={tmp_path}", "--data-dir", str(tmp_path)),
        *("--allow-source", "hf://org", "--allow-source", "s3://bucket/a", "--resolver", "hf://org/{name}"),
        *("--adapter-rescan-seconds", "2.5"),
    )
    assert done.exit_code == 0, done.output
    (settings,) = started
    assert settings.model_dump(exclude_defaults=True, exclude={"data_dir", "cache_dir"}) == {
        "base": "org/model",
        "port": 0,
        "device": "cpu",
        "kv_cache_bytes": 2**31,
        "log_json": True,
        "adapter": (f"a={tmp_path}", f"b={tmp_path}"),
        "allow_source": ("hf://org", "s3://bucket/a"),
        "resolver": "hf://org/{name}",
        "adapter_rescan_seconds": 2.5,
    }
    assert settings.data_dir == tmp_path


def test_a_flag_that_is_not_given_leaves_the_environment_in_force(
    started: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWAPLORA_INSECURE_NO_AUTH", "1")
    assert swaplora("serve", "--host", "0.0.0.0").exit_code == 0
    assert started[0].insecure_no_auth


def test_every_setting_has_a_flag() -> None:
    text = swaplora("serve", "--help").output
    flags = {"--" + name.replace("_", "-") for name in Settings.model_fields} - {"--base"}
    assert [flag for flag in sorted(flags) if flag not in text] == []


@pytest.mark.parametrize("command", TAKE_SETTINGS)
def test_a_setting_is_described_by_its_field(command: str) -> None:
    shown = " ".join(swaplora(*command.split(), "--help").output.split())
    names = Settings.model_fields if command == "serve" else ["base"]
    missing = [name for name in names if str(Settings.model_fields[name].description) not in shown]
    assert missing == []


@pytest.mark.parametrize(
    "line",
    [
        "--port <int> Port to listen on; 0 picks a free one (default 8000).",
        "--kv-cache-bytes SIZE Memory for the KV cache (default: 1GiB, and on a GPU what is left of it).",
        "--adapter-memory-bytes SIZE Memory for resident adapters (default 4GiB).",
        "--adapter, --lora-modules, --lora-paths NAME=PATH An adapter folder; repeatable.",
        "--api-key KEY A key that admits a request; repeatable.",
        "--quantization <int8|nf4> Keep the base's linears in 8 or 4 bits.",
        "--prefix-cache / --no-prefix-cache Compute what prompts begin with in common once (default on).",
        "--log-json Log one JSON object a line.",
        "--adapter-dir <path> Folder whose sub-folders are adapters.",
        "--drain-seconds <float> Time to end requests at shutdown (default 30).",
        "--max-model-len <int> Longest context in tokens (default: the base's).",
    ],
)
def test_help_shows_a_settings_type_and_default(line: str) -> None:
    assert f" {line} " in " ".join(swaplora("serve", "--help").output.split())


@pytest.mark.parametrize(
    ("flag", "value", "complaint"),
    [
        ("--port", "x", "'--port': Input should be a valid integer"),
        ("--drain-seconds", "x", "'--drain-seconds': Input should be a valid number"),
        ("--device", "tpu", "'--device': Value error, 'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        (
            "--max-batch-tokens",
            "x",
            "'--max-batch-tokens' / '--max-num-batched-tokens': Input should be a valid integer",
        ),
    ],
)
def test_a_value_of_another_type_is_refused_by_flag(
    started: list[Settings], flag: str, value: str, complaint: str
) -> None:
    done = swaplora("serve", flag, value)
    assert (done.exit_code, started) == (2, [])
    assert f"Error: Invalid value for {complaint}" in done.stderr


def test_a_switch_can_be_turned_off(started: list[Settings]) -> None:
    assert swaplora("serve", "--no-prefix-cache").exit_code == 0
    assert swaplora("serve", "--no-log-json").exit_code == 2
    assert not started[0].prefix_cache


@pytest.mark.parametrize(
    ("flags", "is_on"),
    [((), None), (("--cuda-graphs",), True), (("--no-cuda-graphs",), False), (("--enforce-eager",), False)],
)
def test_recorded_steps_are_switched_by_vllms_flag_too(
    started: list[Settings], flags: tuple[str, ...], is_on: bool | None
) -> None:
    assert swaplora("serve", *flags).exit_code == 0
    assert started[0].cuda_graphs is is_on


def test_other_servers_flags_are_understood(started: list[Settings], tmp_path: Path) -> None:
    module = json.dumps({"name": "b", "path": str(tmp_path), "base_model_name": "org/model"})
    done = swaplora(
        *("serve", "--model", "org/model", "--enable-lora", "--max-num-batched-tokens", "99", "--max-lora-rank", "64"),
        *("--lora-modules", f"a={tmp_path}", module, f"c={tmp_path}"),
    )
    assert done.exit_code == 0, done.output
    assert done.stderr == "swaplora: --max-lora-rank is ignored: only --adapter-memory-bytes limits adapters\n"
    (settings,) = started
    assert (settings.base, settings.max_batch_tokens) == ("org/model", 99)
    assert list(settings.adapter_folders) == ["a", "b", "c"]


def test_the_flags_of_sglang_are_understood(started: list[Settings], tmp_path: Path) -> None:
    path = json.dumps({"lora_name": "b", "lora_path": str(tmp_path)})
    done = swaplora(
        *("serve", "--model-path", "org/model", "--lora-paths", f"a={tmp_path}", path, f"c={tmp_path}"),
        *("--max-loras-per-batch", "8", "--max-loaded-loras", "16"),
    )
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines() == [
        "swaplora: --max-loras-per-batch is ignored: only --adapter-memory-bytes limits adapters",
        "swaplora: --max-loaded-loras is ignored: only --adapter-memory-bytes limits adapters",
    ]
    (settings,) = started
    assert settings.base == "org/model"
    assert list(settings.adapter_folders) == ["a", "b", "c"]


def test_a_flag_of_another_server_that_has_no_equivalent_is_refused(started: list[Settings]) -> None:
    done = swaplora("serve", "--adapter-memory-fraction", "0.1")
    assert (done.exit_code, started) == (2, [])
    assert "No such option: --adapter-memory-fraction" in done.stderr


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--host", "0.0.0.0"], "swaplora: host: other machines can reach 0.0.0.0"),
        (["--port", "70000"], "swaplora: port: Input should be less than or equal to 65535 (--port, SWAPLORA_PORT"),
        (["--config", "/nowhere.yaml"], "swaplora: config: cannot read /nowhere.yaml: No such file or directory"),
        (["one", "--model", "two"], "swaplora: BASE and --model name different models"),
        (["--lora-modules", '{"name": "a"}'], 'swaplora: {"name": "a"} is neither NAME=PATH'),
        (["--lora-modules", "{name: a}"], "swaplora: {name: a} is neither NAME=PATH"),
        (
            ["--lora-paths", '{"lora_name": "a", "lora_path": "/a", "pinned": true}'],
            'swaplora: {"lora_name": "a", "lora_path": "/a", "pinned": true}: pinned is not honoured here',
        ),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_2(started: list[Settings], args: list[str], complaint: str) -> None:
    done = swaplora("serve", *args)
    assert done.exit_code == 2
    assert done.stderr.startswith(complaint)
    assert done.stderr.count("\n") == 1
    assert started == []


def test_a_server_that_cannot_start_is_one_line_and_exit_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: Settings) -> None:
        raise StartError("cannot listen\non 127.0.0.1:8000")

    replace_server(monkeypatch, run)
    done = swaplora("serve")
    assert (done.exit_code, done.stderr) == (1, "swaplora: cannot listen on 127.0.0.1:8000\n")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (4 * 2**30, "4 GiB"), (2**50, "1024 TiB")],
)
def test_bytes_are_shown_for_people(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_the_banner_says_where_and_what() -> None:
    shown = io.StringIO()
    show_banner(
        Console(file=shown, width=100),
        url="http://127.0.0.1:8000",
        page="http://127.0.0.1:8000/ui",
        base="smol",
        device="cpu",
        kernels="bf16",
        memory=[("base", 2**28), ("KV cache", 2**30)],
        adapters=["[sql]", *map(str, range(20))],
        seconds=2.34,
    )
    text = shown.getvalue()
    assert "URL       http://127.0.0.1:8000 " in text
    assert "page      http://127.0.0.1:8000/ui " in text
    assert "smol (cpu, bf16)" in text
    assert "base 256 MiB · KV cache 1 GiB" in text
    assert "[sql], 0, 1, 2" in text
    assert "and 9 more" in text
    assert "ready in 2.3 s" in text


def test_progress_is_a_line_a_step_when_nobody_watches() -> None:
    shown = io.StringIO()
    with Progress(Console(file=shown)) as progress:
        progress.step("loading [weights]")
        progress.step("compiling")
    assert shown.getvalue() == "loading [weights]\ncompiling\n"


def test_progress_on_a_terminal_ends_each_step_with_its_outcome() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, color_system=None)

    def start() -> None:
        with Progress(console) as progress:
            progress.step("loading")
            progress.step("compiling")
            raise KeyError

    with pytest.raises(KeyError):
        start()
    assert re.search(r"✓ loading \(\d+\.\d s\)\n", shown.getvalue())
    assert re.search(r"✗ compiling \(\d+\.\d s\)\n", shown.getvalue())
