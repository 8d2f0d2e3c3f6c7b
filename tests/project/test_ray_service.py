"""The RayService: pods that Kubernetes takes, fields that KubeRay has, and an application with settings of ours."""

import ast
import copy
import json
import re
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from repository import ROOT
from swaplora_server.config import Settings

SCHEMA = json.loads((ROOT / "tests/project/schemas/rayservice.json").read_text())


@pytest.fixture
def service() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "deploy/ray/rayservice.yaml").read_text())
    return found


def pods(service: dict[str, Any]) -> list[dict[str, Any]]:
    """The head's, then the workers'."""
    cluster = service["spec"]["rayClusterConfig"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def application(service: dict[str, Any]) -> dict[str, Any]:
    (found,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert found.keys() == {"name", "import_path", "route_prefix", "args"}
    return dict(found)


def test_it_is_one_that_the_operator_takes(service: dict[str, Any]) -> None:
    jsonschema.validate(service, SCHEMA)
    for spec in pods(service):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}
        kubernetes_validate.validate(pod, "1.37", strict=True)


@pytest.mark.parametrize(
    "path", ["apiVersion", "spec.rayClusterConfig.headGroupSpec", "spec.rayClusterConfig.rayVersoin"]
)
def test_what_is_wrong_with_it_is_seen(service: dict[str, Any], path: str) -> None:
    *parents, last = path.split(".")
    broken = copy.deepcopy(service)
    part = broken
    for parent in parents:
        part = part[parent]
    part[last] = "wrong"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)


def test_its_application_is_there_and_takes_the_settings(service: dict[str, Any]) -> None:
    found = application(service)
    module, _, function = found["import_path"].partition(":")
    tree = ast.parse((ROOT / "server" / module.replace(".", "/")).with_suffix(".py").read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    settings = Settings(ray=True, api_key="k", **found["args"])
    assert settings.num_replicas == (1, 1)  # more would need a store
    (worker,) = pods(service)[1:]
    assert worker["terminationGracePeriodSeconds"] > settings.drain_seconds
    (container,) = worker["containers"]
    assert int(container["resources"]["requests"]["cpu"]) > (settings.ray_cpus or 0)


def test_its_pods_are_as_safe_as_the_others(service: dict[str, Any]) -> None:
    for spec in pods(service):
        (container,) = spec["containers"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert not any("value" in each for each in container["env"] if "KEY" in each["name"])


def test_its_ray_is_the_images_and_one_that_we_take(service: dict[str, Any]) -> None:
    (installed,) = re.findall(r"ray\[serve\]==([\d.]+)", (ROOT / "deploy/ray/Dockerfile").read_text())
    assert installed == service["spec"]["rayClusterConfig"]["rayVersion"]
    assert '"ray[serve]>=2.60,<3"' in (ROOT / "pyproject.toml").read_text()
    (image,) = {container["image"] for spec in pods(service) for container in spec["containers"]}
    assert image in (ROOT / "deploy/ray/README.md").read_text()


def test_nobody_joins_its_ray_without_a_token(service: dict[str, Any]) -> None:
    assert service["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    assert not any(
        each["name"].startswith("RAY_AUTH") for spec in pods(service) for each in spec["containers"][0]["env"]
    )
