import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic_settings import SettingsError

import swaplora_server
from swaplora_server.config import Settings, complaints
from swaplora_server.config_values import parse_size


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "SWAPLORA_CONFIG",
        "SWAPLORA_API_KEY",
        "NIM_PEFT_SOURCE",
        "VLLM_LORA_RESOLVER_CACHE_DIR",
        "NIM_PEFT_REFRESH_INTERVAL",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def settings(**values: Any) -> Settings:
    return Settings(**values)


def refusal(**values: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        settings(**values)
    return complaints(caught.value)


def yaml_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "swaplora.yaml"
    path.write_text(text)
    return path


def test_a_flag_beats_the_environment_beats_yaml_beats_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = yaml_file(tmp_path, "port: 1\nmax_num_seqs: 1\nmax_waiting: 1\n")
    monkeypatch.setenv("SWAPLORA_PORT", "2")
    monkeypatch.setenv("SWAPLORA_MAX_NUM_SEQS", "2")
    found = settings(config=config, port=3)
    assert (found.port, found.max_num_seqs, found.max_waiting, found.max_batch_tokens) == (3, 2, 1, 512)


def test_the_config_file_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAPLORA_CONFIG", str(yaml_file(tmp_path, "port: 1\n")))
    assert settings().port == 1


def test_an_empty_config_file_and_an_empty_variable_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWAPLORA_PORT", "")
    assert settings(config=yaml_file(tmp_path, "# nothing\n")).port == 8000


def test_an_unknown_key_is_named_with_the_one_that_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAPLORA_PROT", "1")
    lines = refusal(config=yaml_file(tmp_path, "max-num-seqs: 1\n"))
    assert sorted(lines) == [
        "SWAPLORA_PROT: no such setting; did you mean SWAPLORA_PORT?",
        "max-num-seqs: no such setting; did you mean max_num_seqs?",
    ]


def test_variables_that_are_the_clients_are_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAPLORA_URL", "http://127.0.0.1:8000")
    assert settings().port == 8000


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("port: [", "is not YAML"),
        ("- port", "must be a mapping"),
        ("config: other.yaml", "cannot name another config file"),
    ],
)
def test_a_broken_config_file_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        settings(config=yaml_file(tmp_path, text))


def test_a_missing_config_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"cannot read .*nowhere\.yaml: No such file"):
        settings(config=tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (7, 7),
        ("7", 7),
        ("512MiB", 512 * 2**20),
        ("4GB", 4 * 10**9),
        ("1.5 gib", 3 * 2**29),
        ("2k", 2000),
        ("10B", 10),
    ],
)
def test_a_size_is_a_number_of_bytes_or_has_a_unit(written: object, size: int) -> None:
    assert parse_size(written) == size
    assert settings(kv_cache_bytes=written).kv_cache_bytes == size


def test_the_kv_caches_size_may_be_left_to_the_machine() -> None:
    assert settings(kv_cache_bytes="auto").kv_cache_bytes is settings().kv_cache_bytes is None


@pytest.mark.parametrize("written", ["", "5,000MB", "1e9", "-1", "3 bits", "MiB", 0, -1, "0", "9999999TiB"])
def test_what_is_no_size_is_refused(written: object) -> None:
    (line,) = refusal(kv_cache_bytes=written)
    assert line.startswith("kv_cache_bytes: ")
    assert line.endswith("(--kv-cache-bytes, SWAPLORA_KV_CACHE_BYTES or kv_cache_bytes in the config file)")


@pytest.mark.parametrize(
    "values",
    [
        {"port": -1},
        {"port": 65536},
        {"block_size": 0},
        {"max_batch_tokens": 2**31},
        {"max_num_seqs": 0},
        {"max_waiting": -1},
        {"tokenizer_threads": 0},
        {"body_memory_bytes": 0},
        {"max_model_len": 2**63},
        {"keep_versions": 0},
        {"drain_seconds": float("inf")},
        {"device": "tpu"},
        {"dtype": "fp8"},
        {"base": ""},
        {"served_model_name": "two words"},
    ],
)
def test_every_value_has_bounds(values: Mapping[str, Any]) -> None:
    (line,) = refusal(**values)
    assert line.startswith(next(iter(values)))


def test_the_memory_for_bodies_holds_at_least_one() -> None:
    assert settings(body_memory_bytes="32MiB", max_body_bytes="32MiB").body_memory_bytes == 32 * 2**20
    (line,) = refusal(body_memory_bytes="32MiB", max_body_bytes="33MiB")
    assert line.startswith("body_memory_bytes: ")
    assert "raise one or lower the other" in line


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        settings().port = 1  # type: ignore[misc]  # what the test is about


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_this_machine_needs_no_key(host: str) -> None:
    assert settings(host=host).is_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", "localhost.example.org"])
def test_any_other_address_needs_a_key(host: str) -> None:
    (line,) = refusal(host=host)
    assert "set --api-key (SWAPLORA_API_KEY), or --insecure-no-auth" in line
    assert not settings(host=host, api_key=("secret",)).is_loopback
    assert not settings(host=host, insecure_no_auth=True).is_loopback


def test_keys_are_split_at_commas_in_the_environment_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAPLORA_API_KEY", "alpha, beta")
    found = settings()
    assert [key.get_secret_value() for key in found.api_key] == ["alpha", "beta"]
    assert "alpha" not in repr(found)


@pytest.mark.parametrize("keys", ["alpha,", ",", ("",)])
def test_an_empty_key_is_refused_without_showing_the_others(keys: object) -> None:
    lines = refusal(api_key=keys)
    assert lines
    assert "alpha" not in " ".join(lines)


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("embedded", "smollm2-135m-instruct"),
        ("embedded-minilm", "all-minilm-l6-v2"),
        ("HuggingFaceTB/SmolLM2-360M", "SmolLM2-360M"),
        ("/models/llama/", "llama"),
    ],
)
def test_the_base_is_called_by_its_last_part(base: str, name: str) -> None:
    assert settings(base=base).base_id == name
    assert settings(base=base, served_model_name="other").base_id == "other"


def test_adapters_are_named_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAPLORA_ADAPTER", f"sql={tmp_path},chat={tmp_path}")
    assert settings().adapter_folders == {"sql": tmp_path, "chat": tmp_path}


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        (("sql",), "'sql' is not NAME=PATH"),
        (("=/tmp",), "'=/tmp' is not NAME=PATH"),
        (("a=/", "a=/"), "given twice"),
        (("a=/nowhere",), "a: /nowhere is not a folder"),
        (("no name=/",), "'no name': an adapter's name is"),
        (("../x=/",), "'../x': an adapter's name is"),
        (("smollm2-135m-instruct=/",), "is what the base is called"),
    ],
)
def test_an_adapter_that_cannot_be_meant_is_refused(entries: tuple[str, ...], complaint: str) -> None:
    (line,) = refusal(adapter=entries)
    assert line.startswith("adapter: ")
    assert complaint in line


@pytest.mark.parametrize(
    "prefix", ["", "https://example.org", "hf:org", "hf://a/b/c", "file:folder", "s3://B", "hf://user:hunter2@org"]
)
def test_a_source_that_is_written_wrongly_is_refused(prefix: str) -> None:
    (line,) = refusal(allow_source=("hf://org", prefix))
    assert line.startswith("allow_source: ")
    assert "--allow-source, SWAPLORA_ALLOW_SOURCE" in line
    assert "hunter2" not in line
    assert settings(allow_source="hf://org, s3://bucket/prefix").allow_source == ("hf://org", "s3://bucket/prefix")


@pytest.mark.parametrize("template", ["hf://org/repo", "file:{name}", "hf://{name}/{name}", "{name}", "s3://{name}"])
def test_a_resolver_that_is_written_wrongly_is_refused(template: str) -> None:
    (line,) = refusal(resolver=template)
    assert line.startswith("resolver: ")
    assert "--resolver, SWAPLORA_RESOLVER" in line
    assert settings(resolver="hf://org/{name}").resolver == "hf://org/{name}"


def test_the_adapter_folder_falls_back_to_other_servers_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, other, ours = (tmp_path / name for name in ("theirs", "other", "ours"))
    for folder in (theirs, other, ours):
        folder.mkdir()
    monkeypatch.setenv("VLLM_LORA_RESOLVER_CACHE_DIR", str(other))
    assert settings().adapter_dir == other
    monkeypatch.setenv("NIM_PEFT_SOURCE", str(theirs))
    assert settings().adapter_dir == theirs
    assert settings(config=yaml_file(tmp_path, f"adapter_dir: {ours}\n")).adapter_dir == ours
    assert settings().adapter_rescan_seconds == 10
    monkeypatch.setenv("NIM_PEFT_REFRESH_INTERVAL", "60")
    assert settings().adapter_rescan_seconds == 60
    assert settings(adapter_rescan_seconds=0).adapter_rescan_seconds == 0


def test_an_adapter_folder_must_be_there(tmp_path: Path) -> None:
    (line,) = refusal(adapter_dir=tmp_path / "nowhere")
    assert line.startswith("adapter_dir: Path does not point to a directory")


def test_folders_follow_xdg_and_expand_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings().data_dir == tmp_path / "data/swaplora"
    assert settings().cache_dir == tmp_path / "cache/swaplora"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert settings().data_dir == tmp_path / ".local/share/swaplora"
    assert settings().cache_dir == tmp_path / ".cache/swaplora"
    assert settings(data_dir="~/d").data_dir == tmp_path / "d"


def test_every_setting_says_what_it_is() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_reading_settings_imports_no_torch() -> None:
    code = (
        "import sys, swaplora_server.config;"
        " print(*({'torch', 'transformers', 'fastapi', 'numpy'} & sys.modules.keys()))"
    )
    root = Path(swaplora_server.__file__).parents[1]
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
        == "\n"
    )


def test_every_page_is_let_in_only_where_a_key_is_wanted_or_nobody_minds() -> None:
    assert "cors_allow_origin: * lets every web page ask" in refusal(cors_allow_origin="*")[0]
    assert settings(cors_allow_origin="*", api_key="key").cors_allow_origin == ("*",)
    assert settings(cors_allow_origin="*", insecure_no_auth=True).cors_allow_origin == ("*",)


def test_an_origin_is_a_scheme_and_a_host() -> None:
    assert settings(cors_allow_origin="https://A.example, app://obsidian.md").cors_allow_origin == (
        "https://a.example",
        "app://obsidian.md",
    )
    for origin in ("a.example", "https://a.example/", "https://a.example/path", "null", ""):
        (line,) = refusal(cors_allow_origin=(origin,))
        assert "is not an origin" in line


def test_a_root_path_stands_in_front_of_others() -> None:
    assert settings().root_path == ""
    assert settings(root_path="/a/b-c.d").root_path == "/a/b-c.d"
    for wrong in ("a", "/", "/a/", "//a", "/a b", "/a?b", "/%41"):
        assert "write /PATH" in refusal(root_path=wrong)[0]
    assert "/v1 is where routes themselves begin" in refusal(root_path="/v1")[0]
    assert "/adapters is where routes" in refusal(root_path="/adapters/x")[0]
