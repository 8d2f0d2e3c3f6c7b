import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from repository import ROOT
from swaplora_server.config import Settings


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    """Those of the compose file: for a CPU, for a GPU, and what observes either."""
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    found: dict[str, dict[str, Any]] = compose["services"]
    assert list(found) == ["swaplora", "gpu", "prometheus", "grafana"]
    return found


@pytest.fixture(scope="module", params=["swaplora", "gpu"])
def service(services: dict[str, dict[str, Any]], request: pytest.FixtureRequest) -> dict[str, Any]:
    return services[request.param]


@pytest.fixture(scope="module")
def stages() -> list[list[str]]:
    """The instructions of the Dockerfile, one list a stage, continuation lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    _, *stages = re.split(r"^(?=FROM )", text, flags=re.MULTILINE)
    return [[line for line in stage.splitlines() if line] for stage in stages]


def test_the_service_is_published_on_this_machine_only(service: dict[str, Any]) -> None:
    assert service["ports"] == ["127.0.0.1:8000:8000"]


def test_the_service_wants_a_key(service: dict[str, Any]) -> None:
    assert service["environment"]["SWAPLORA_API_KEY"].startswith("${SWAPLORA_API_KEY:?")


def test_the_service_can_write_to_its_volumes_only(service: dict[str, Any], stages: list[list[str]]) -> None:
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert 'VOLUME ["/cache", "/data"]' in stages[-1]
    assert service["volumes"] == ["cache:/cache", "data:/data"]


def test_the_service_is_given_time_to_drain(service: dict[str, Any]) -> None:
    assert int(service["stop_grace_period"].removesuffix("s")) > Settings.model_fields["drain_seconds"].default


def test_the_service_on_a_gpu_is_another_image_and_starts_by_its_profile(services: dict[str, dict[str, Any]]) -> None:
    cpu, gpu = services["swaplora"], services["gpu"]
    assert gpu["profiles"] == ["gpu"]
    assert "profiles" not in cpu
    assert gpu["image"] != cpu["image"]
    assert gpu["build"]["args"] == {"VARIANT": "cuda"}
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert gpu["networks"] == {"default": {"aliases": ["swaplora"]}}  # where it is scraped
    own = {"profiles", "image", "build", "deploy", "networks"}
    assert {name: value for name, value in gpu.items() if name not in own} == {
        name: value for name, value in cpu.items() if name not in own
    }


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_what_observes_is_on_this_machine_only_and_starts_by_its_profile(
    services: dict[str, dict[str, Any]], name: str
) -> None:
    assert services[name]["profiles"] == ["observability"]
    assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"])
    assert services[name]["cap_drop"] == ["ALL"]
    assert ":" in services[name]["image"]


def test_the_image_has_a_compiler_for_its_kernels(stages: list[list[str]]) -> None:
    assert any(re.search(r"apt-get install [^&]*\bg\+\+", line) for line in stages[-1])


def test_the_build_compiles_the_kernels_ahead_by_a_module_that_is_there(stages: list[list[str]]) -> None:
    (module,) = re.findall(r"python -m (swaplora_server[\w.]*)", " ".join(stages[0]))
    assert (ROOT / "server" / Path(*module.split("."))).with_suffix(".py").is_file()
    assert any(re.search(r"apt-get install [^&]*\bg\+\+", line) for line in stages[0])


def test_the_image_does_not_run_as_root(stages: list[list[str]]) -> None:
    (user,) = (line for line in stages[-1] if line.startswith("USER"))
    assert user == "USER 10001:10001"


def test_the_image_has_a_health_check(stages: list[list[str]]) -> None:
    (check,) = (line for line in stages[-1] if line.startswith("HEALTHCHECK"))
    assert "/health" in check


def test_the_image_listens_beyond_itself_and_has_no_key_of_its_own(stages: list[list[str]]) -> None:
    (environment,) = (line for line in stages[-1] if line.startswith("ENV"))
    assert "SWAPLORA_HOST=0.0.0.0" in environment
    assert "KEY=" not in environment
    assert "NO_AUTH" not in environment


def test_the_image_sets_only_what_the_server_knows(stages: list[list[str]]) -> None:
    names = re.findall(r"SWAPLORA_(\w+)=", " ".join(stages[-1]))
    assert {name.lower() for name in names} <= Settings.model_fields.keys()


def test_the_build_sees_all_that_the_image_copies(stages: list[list[str]]) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = (line.split()[1:-1] for line in stages[0] if line.startswith("COPY"))
    assert {source for sources in copies for source in sources} == allowed


def test_torch_is_the_same_release_everywhere() -> None:
    releases = {
        re.findall(pattern, (ROOT / name).read_text())[0]
        for name, pattern in {"Dockerfile": r"ARG TORCH=(\S+)", "Makefile": r"torch==(\S+)"}.items()
    }
    assert len(releases) == 1
