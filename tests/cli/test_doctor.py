"""`swaplora doctor` says what costs speed and what would end a start, and nothing that is secret."""

import json
import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from fake_server import swaplora
from swaplora_server.config import Settings, origins
from swaplora_server.doctor import disk, software
from swaplora_server.doctor.disk import disk_findings
from swaplora_server.doctor.finding import Effect, Finding
from swaplora_server.doctor.machine import machine_findings
from swaplora_server.doctor.software import software_findings

FAST = "fpu avx2 fma avx512f avx512_bf16"


@pytest.fixture(autouse=True)
def _nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("OMP_NUM_THREADS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SWAPLORA_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("SWAPLORA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(software, "find_gpus", list)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))


def machine(root: Path, flags: str = FAST, gib: int = 64, **files: str) -> Path:
    """`proc` and `sys` of a machine with 8 cores."""
    info = f"processor: 0\nmodel name\t: Fast One\ncpu family\t: 6\nmodel\t: 1\nflags\t\t: {flags}\n\nprocessor: 1\n"
    for path, text in {
        "proc/cpuinfo": info,
        "proc/meminfo": f"MemTotal:       {gib * 2**20} kB\nMemFree: 1 kB\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
        **{name.replace("__", "/").replace("_DOT_", "."): text for name, text in files.items()},
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def by_subject(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def machine_of(root: Path, settings: Settings | None = None, **made: Any) -> dict[str, Finding]:
    return by_subject(machine_findings(settings or Settings(), machine(root, **made)))


def test_a_machine_without_fault_is_described_and_nothing_is_said_of_it(tmp_path: Path) -> None:
    found = machine_of(tmp_path)
    assert {finding.effect for finding in found.values()} == {Effect.FINE}
    assert not any(finding.remark for finding in found.values())
    assert found["processor"].found == "Fast One (family 6, model 1)"
    assert found["instruction sets"].found == "avx2, fma, avx512f, avx512_bf16"
    assert (found["cores"].found, found["memory"].found, found["huge pages"].found) == ("8", "64 GiB", "madvise")


@pytest.mark.parametrize(
    ("made", "subject", "said"),
    [
        ({"flags": "fpu avx2 fma"}, "instruction sets", "without avx512f"),
        ({"flags": "fpu avx2 fma avx512f"}, "instruction sets", "without avx512_bf16 or amx_bf16"),
        ({"sys__fs__cgroup__cpu_DOT_max": "150000 100000"}, "cores", "share of 1.5"),
        ({"sys__devices__system__cpu__cpu0__cpufreq__scaling_governor": "powersave\n"}, "governor", "performance"),
        ({"sys__kernel__mm__transparent_hugepage__enabled": "always madvise [never]"}, "huge pages", "madvise"),
        ({"sys__fs__cgroup__memory_DOT_max": str(2**30)}, "memory", "--adapter-memory-bytes"),
        ({"gib": 2}, "memory", "may take 5 GiB"),
    ],
)
def test_what_a_machine_lacks_costs_speed(tmp_path: Path, made: dict[str, Any], subject: str, said: str) -> None:
    found = machine_of(tmp_path, **made)
    assert said in found[subject].remark
    assert {name for name, finding in found.items() if finding.effect is not Effect.FINE} == {subject}
    assert found[subject].effect is Effect.SLOW


@pytest.mark.parametrize(
    "made",
    [
        {"sys__fs__cgroup__cpu_DOT_max": "max 100000", "sys__fs__cgroup__memory_DOT_max": "max"},
        {"sys__devices__system__cpu__cpu0__cpufreq__scaling_governor": "performance"},
        {"flags": "fpu avx2 fma avx512f amx_bf16"},
    ],
)
def test_limits_that_limit_nothing_are_not_remarked_on(tmp_path: Path, made: dict[str, Any]) -> None:
    assert not any(finding.remark for finding in machine_of(tmp_path, **made).values())


def test_few_threads_and_few_files_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (1024, 1024))
    found = machine_of(tmp_path)
    assert "OMP_NUM_THREADS is 2" in found["cores"].remark
    assert "ulimit -n" in found["open files"].remark


def test_a_gpus_memory_is_not_the_hosts(tmp_path: Path) -> None:
    assert machine_of(tmp_path, Settings(device="cuda"), gib=2)["memory"].remark == ""


def software_of(**fields: Any) -> dict[str, Finding]:
    return by_subject(software_findings(Settings(port=0, **fields)))


def test_without_a_compiler_there_are_no_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    assert software_of()["compiler"].effect is Effect.SLOW
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name == "clang++" else None)
    assert software_of()["compiler"] == Finding("compiler", "/bin/clang++")


def test_a_gpu_that_is_asked_for_and_not_there_ends_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    assert software_of()["GPU"] == Finding("GPU", "none")
    assert "GPU" not in software_of(device="cpu")
    assert software_of(device="cuda")["GPU"].effect is Effect.FAILS
    monkeypatch.setattr(software, "find_gpus", lambda: ["H100, 81559 MiB, 550.1"])
    monkeypatch.setattr(software, "version", lambda _name: "2.13.0+cpu")
    assert "torch is built for CPUs" in software_of()["GPU"].remark
    monkeypatch.setattr(software, "version", lambda _name: "2.13.0")
    found = software_of(device="cuda")
    assert found["GPU"] == Finding("GPU", "H100, 81559 MiB, 550.1")
    assert "compiler" not in found


def test_a_driver_that_says_nothing_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def hang(*_args: object, **_options: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 5)

    monkeypatch.setattr(subprocess, "run", hang)
    assert software.find_gpus() == []


def test_a_base_that_is_no_model_ends_a_start(tmp_path: Path, base: Path) -> None:
    assert software_of(base=str(base))["base"].effect is Effect.FINE
    assert software_of(base="ORG/model")["base"].effect is Effect.FINE
    assert "config.json" in software_of(base=str(tmp_path))["base"].remark
    missing = software_of(base=str(tmp_path / "missing"))["base"]
    assert (missing.effect, "no such folder" in missing.remark) == (Effect.FAILS, True)


def test_what_quantisation_needs_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "_version", lambda _name: None)
    assert software_of(quantization="nf4")["bitsandbytes"].effect is Effect.FAILS
    assert "bitsandbytes" not in software_of()


def test_a_port_that_is_taken_ends_a_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = by_subject(software_findings(Settings(port=port)))["address"]
    assert (found.effect, "--port" in found.remark) == (Effect.FAILS, True)


def test_folders_are_tried_and_left_as_they_are(tmp_path: Path) -> None:
    found = by_subject(disk_findings(Settings()))
    assert found["data folder"].found.startswith(f"{tmp_path / 'data'}, ")
    assert " free, a durable write in " in found["cache folder"].found
    assert list(tmp_path.iterdir()) == []


def test_full_and_slow_disks_are_told_and_one_that_cannot_be_written_ends_a_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # noqa: SLF001
    monkeypatch.setattr(disk, "sync_seconds", lambda _folder: 0.2)
    told = by_subject(disk_findings(Settings()))["data folder"]
    assert (told.effect, "less is free than 1 GiB" in told.remark, "slow" in told.remark) == (Effect.SLOW, True, True)
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    refused = by_subject(disk_findings(Settings(data_dir=tmp_path / "file/data", cache_dir=tmp_path)))
    assert refused["data folder"].effect is Effect.FAILS
    assert "--data-dir" in refused["data folder"].remark


def test_each_setting_says_where_it_is_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("max_waiting: 3\nport: 1\nblock_size: 8\n")
    monkeypatch.setenv("SWAPLORA_BLOCK_SIZE", "4")
    monkeypatch.setenv("NIM_PEFT_REFRESH_INTERVAL", "9")
    given: dict[str, Any] = {"port": 2, "config": file}
    settings = Settings(**given)
    whence = origins(settings, given)
    assert (settings.port, settings.block_size, settings.max_waiting) == (2, 4, 3)
    assert whence["port"] == whence["config"] == "flag"
    assert whence["block_size"] == "SWAPLORA_BLOCK_SIZE"
    assert whence["max_waiting"] == str(file)
    assert whence["adapter_rescan_seconds"] == "another server's variable"
    assert whence["keep_versions"] == "default"


def test_no_key_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAPLORA_API_KEY", "topsecret")
    for form in ((), ("--json",)):
        done = swaplora("doctor", "--port", "0", *form)
        assert done.exit_code == 0, done.output
        assert "topsecret" not in done.output
        assert "SWAPLORA_API_KEY" in done.output


def test_a_script_reads_findings_and_settings_and_the_exit_code_is_for_a_start_that_fails() -> None:
    done = swaplora("doctor", "--port", "0", "--device", "cuda", "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 1
    assert [finding["subject"] for finding in told["findings"] if finding["effect"] == "fails"] == ["GPU"]
    assert told["settings"]["device"] == {"value": "cuda", "from": "flag"}
    assert told["settings"].keys() == Settings.model_fields.keys()
    assert swaplora("doctor", "--port", "0").exit_code == 0
    assert swaplora("doctor", "--port", "none").exit_code == 2


def test_a_person_reads_a_line_for_each_and_the_settings_that_are_not_defaults() -> None:
    lines = swaplora("doctor", "--port", "0", "--device", "cuda").output.splitlines()
    assert "fails GPU: none" in lines
    assert "      --device cuda needs one, and NVIDIA's driver lists none" in lines
    assert "      device = cuda (flag)" in lines
    assert not any("keep_versions" in line for line in lines)
