"""The Helm chart and the manifests beside it: rendered, and held against Kubernetes' schemas and the server's settings.

Kinds that Kubernetes itself does not have are held against those schemas that packages bring (`schemas/`, each with its
source); of all it is held that they lead to what is there.
"""

import copy
import json
from collections.abc import Iterator
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml

from repository import ROOT
from swaplora_server.config import Settings

CHART = ROOT / "deploy/chart"
KEY = {"existingSecret": "keys"}
EVERYTHING: dict[str, Any] = {
    "auth": KEY | {"keyFileSecret": "key-file"},
    "adapters": {
        "existingClaim": "shared",
        "resolver": "s3://bucket/{name}",
        "allowSource": ["hf://ORG"],
        "credentialsSecret": "aws",
    },
    "settings": {"base": "ORG/model", "max_num_seqs": 32, "adapter_memory_bytes": "2GiB"},
    "data": {"storageClassName": "fast"},
    "cache": {"existingClaim": "cache"},
    "gpu": {"enabled": True, "count": 2, "runtimeClassName": "nvidia"},
    "imagePullSecrets": [{"name": "registry"}],
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "dashboard": {"enabled": True},
    "tracing": {"endpoint": "http://collector.tracing:4318"},
    "keda": {"enabled": True},
    "networkPolicy": {
        "egressPorts": [443, 4318],
        "from": [{"namespaceSelector": {"matchLabels": {"name": "gateway"}}}],
    },
    "integrations": {
        "inferencePool": {"enabled": True, "endpointPicker": "picker"},
        "aibrix": {"enabled": True},
        "productionStack": {"enabled": True},
    },
    "podLabels": {"team": "a"},
    "podAnnotations": {"note": "b"},
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
}
CASES: dict[str, dict[str, Any]] = {
    "least": {"auth": KEY},
    "everything": EVERYTHING,
    "no key": {"auth": {"insecureNoAuth": True}, "data": {"persistent": False}, "networkPolicy": {"enabled": False}},
}
CORE = {"ConfigMap", "NetworkPolicy", "PodDisruptionBudget", "Service", "StatefulSet"}
OTHERS = {
    kind: json.loads((ROOT / "tests/project/schemas" / f"{kind.lower()}.json").read_text())
    for kind in ("ServiceMonitor", "ScaledObject")
}
Manifests = dict[str, dict[str, Any]]  # by kind; of the services the one that is asked


@pytest.fixture(scope="module")
def chart() -> Iterator[helm_python.Chart]:
    with helm_python.Chart.load(CHART) as loaded:
        yield loaded


def render(chart: helm_python.Chart, values: dict[str, Any]) -> Manifests:
    rendered = chart.render(values, name="law", namespace="models")
    documents = [document for path, text in rendered.items() if path.endswith(".yaml") for document in split(text)]
    return {document["kind"]: document for document in reversed(documents)}


def split(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


def pod(manifests: Manifests) -> dict[str, Any]:
    template: dict[str, Any] = manifests["StatefulSet"]["spec"]["template"]
    return template


def container(manifests: Manifests) -> dict[str, Any]:
    (only,) = pod(manifests)["spec"]["containers"]
    found: dict[str, Any] = only
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_chart_is_sound_and_kubernetes_knows_all_that_it_says(chart: helm_python.Chart, case: str) -> None:
    assert helm_python.lint(CHART, CASES[case], strict=True)["errors"] == []
    rendered = chart.render(CASES[case], name="law", namespace="models")
    documents = [document for path, text in rendered.items() if path.endswith(".yaml") for document in split(text)]
    assert {document["metadata"]["namespace"] for document in documents} == {"models"}
    for document in documents:
        if document["kind"] in CORE:
            kubernetes_validate.validate(document, "1.37", strict=True)
        elif document["kind"] in OTHERS:
            jsonschema.validate(document, OTHERS[document["kind"]])


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("ServiceMonitor", ("apiVersion",), "monitoring.coreos.com/v2"),
        ("ServiceMonitor", ("spec", "endpoint"), []),
        ("ServiceMonitor", ("spec", "endpoints", 0, "interval"), "often"),
        ("ServiceMonitor", ("spec", "endpoints", 0, "authorization", "credentials", "keys"), "x"),
        ("ServiceMonitor", ("spec", "selector"), "law"),
        ("ScaledObject", ("spec", "scaleTargetRef", "name"), None),
        ("ScaledObject", ("spec", "minReplicas"), 1),
        ("ScaledObject", ("spec", "maxReplicaCount"), "4"),
        ("ScaledObject", ("spec", "triggers", 0, "metadata", "threshold"), 5),
    ],
)
def test_the_schemas_of_others_refuse_what_is_wrong(
    chart: helm_python.Chart, kind: str, path: tuple[str | int, ...], value: object
) -> None:
    document = copy.deepcopy(render(chart, EVERYTHING)[kind])
    jsonschema.validate(document, OTHERS[kind])
    place: Any = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, OTHERS[kind])


def test_spans_go_where_the_values_say(chart: helm_python.Chart) -> None:
    told = {entry["name"]: entry.get("value") for entry in container(render(chart, EVERYTHING))["env"]}
    assert told["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://collector.tracing:4318"
    assert told["SWAPLORA_TRACING"] == "true"
    policy = render(chart, EVERYTHING)["NetworkPolicy"]["spec"]["egress"][0]["ports"]
    assert {"protocol": "TCP", "port": 4318} in policy
    least = {entry["name"] for entry in container(render(chart, CASES["least"]))["env"]}
    assert not [name for name in least if "OTEL" in name or "TRACING" in name]


def test_everything_has_every_kind(chart: helm_python.Chart) -> None:
    assert render(chart, EVERYTHING).keys() == CORE | {"InferencePool", "ScaledObject", "ServiceMonitor"}


@pytest.mark.parametrize("case", CASES)
def test_the_settings_are_the_servers(chart: helm_python.Chart, case: str) -> None:
    config = next(text for path, text in chart.render(CASES[case], name="law").items() if "configmap" in path)
    settings = yaml.safe_load(split(config)[0]["data"]["config.yaml"])
    settings.pop("adapter_dir", None)  # a folder of the pod's
    keys: dict[str, Any] = {"api_key": "key"} if "existingSecret" in CASES[case]["auth"] else {}
    made = Settings(**settings, **keys)
    assert (made.host, made.port, str(made.data_dir)) == ("0.0.0.0", 8000, "/data")
    assert made.has_keys != made.insecure_no_auth


def test_a_pod_drains_before_it_is_killed(chart: helm_python.Chart) -> None:
    manifests = render(chart, {"auth": KEY, "drainSeconds": 100, "preStopSeconds": 7})
    config = yaml.safe_load(manifests["ConfigMap"]["data"]["config.yaml"])
    assert config["drain_seconds"] == 100
    assert container(manifests)["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]
    assert pod(manifests)["spec"]["terminationGracePeriodSeconds"] >= 100 + 7 + 5


@pytest.mark.parametrize("case", CASES)
def test_a_pod_can_write_to_its_volumes_only_and_is_not_root(chart: helm_python.Chart, case: str) -> None:
    manifests = render(chart, CASES[case])
    security, spec = container(manifests)["securityContext"], pod(manifests)["spec"]
    assert security == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["securityContext"]["runAsNonRoot"]
    assert f"USER {spec['securityContext']['runAsUser']}" in (ROOT / "Dockerfile").read_text()
    assert not spec["automountServiceAccountToken"]
    writable = {mount["mountPath"] for mount in container(manifests)["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/data", "/cache", "/tmp"}
    claims = manifests["StatefulSet"]["spec"].get("volumeClaimTemplates", [])
    volumes = {volume["name"] for volume in spec["volumes"]} | {claim["metadata"]["name"] for claim in claims}
    assert {mount["name"] for mount in container(manifests)["volumeMounts"]} == volumes


def test_variables_of_services_are_not_taken_for_settings(chart: helm_python.Chart) -> None:
    """A service called swaplora would give each pod a SWAPLORA_PORT."""
    assert pod(render(chart, {"auth": KEY}))["spec"]["enableServiceLinks"] is False


def test_probes_ask_routes_that_need_no_key(chart: helm_python.Chart) -> None:
    found = container(render(chart, {"auth": KEY, "startSeconds": 60}))
    paths = {name: found[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/health/ready", "liveness": "/health", "readiness": "/health/ready"}
    assert found["startupProbe"]["periodSeconds"] * found["startupProbe"]["failureThreshold"] == 60


def test_keys_come_from_secrets(chart: helm_python.Chart) -> None:
    manifests = render(chart, EVERYTHING)
    (variable,) = (each for each in container(manifests)["env"] if each["name"] == "SWAPLORA_API_KEY")
    assert variable["valueFrom"]["secretKeyRef"] == {"name": "keys", "key": "api-key"}
    assert "api_key" not in manifests["ConfigMap"]["data"]["config.yaml"]
    assert container(manifests)["envFrom"] == [{"secretRef": {"name": "aws"}}]


def test_a_gpu_is_asked_for(chart: helm_python.Chart) -> None:
    manifests = render(chart, EVERYTHING)
    assert container(manifests)["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert "nvidia.com/gpu" not in container(render(chart, {"auth": KEY}))["resources"]["limits"]


def test_what_selects_pods_and_services_finds_them(chart: helm_python.Chart) -> None:
    manifests = render(chart, EVERYTHING)
    labels = pod(manifests)["metadata"]["labels"]
    (port,) = container(manifests)["ports"]
    service = manifests["Service"]
    for kind, path in {
        "Service": ("selector",),
        "StatefulSet": ("selector", "matchLabels"),
        "PodDisruptionBudget": ("selector", "matchLabels"),
        "NetworkPolicy": ("podSelector", "matchLabels"),
        "InferencePool": ("selector", "matchLabels"),
    }.items():
        selector = manifests[kind]["spec"]
        for part in path:
            selector = selector[part]
        assert selector.items() <= labels.items(), kind
    assert [each["targetPort"] for each in service["spec"]["ports"]] == [port["name"]]
    assert manifests["InferencePool"]["spec"]["targetPorts"] == [{"number": port["containerPort"]}]
    assert manifests["NetworkPolicy"]["spec"]["ingress"][0]["ports"][0]["port"] == port["containerPort"]
    monitor = manifests["ServiceMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    assert monitor["endpoints"][0]["authorization"]["credentials"] == {"name": "keys", "key": "api-key"}
    scaled = manifests["ScaledObject"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == manifests["StatefulSet"]["metadata"]["name"]
    assert "replicas" not in manifests["StatefulSet"]["spec"]
    assert f'service="{service["metadata"]["name"]}"' in scaled["triggers"][0]["metadata"]["query"]


def test_the_services_are_two_and_one_is_scraped(chart: helm_python.Chart) -> None:
    text = next(text for path, text in chart.render({"auth": KEY}, name="law").items() if "service.yaml" in path)
    services = {service["metadata"]["name"]: service for service in split(text)}
    assert services.keys() == {"law", "law-pods"}
    assert services["law-pods"]["spec"]["clusterIP"] == "None"
    assert [each["metadata"]["labels"]["app.kubernetes.io/component"] for each in services.values()] == ["api", "pods"]


def test_adapters_of_other_control_planes_find_the_pods(chart: helm_python.Chart) -> None:
    values = EVERYTHING | {"settings": {"base": "embedded"}}
    labels = pod(render(chart, values))["metadata"]["labels"]
    aibrix = yaml.safe_load((ROOT / "deploy/kubernetes/aibrix.yaml").read_text())["spec"]
    stack = yaml.safe_load((ROOT / "deploy/kubernetes/production-stack.yaml").read_text())["spec"]
    assert aibrix["podSelector"]["matchLabels"].items() <= labels.items()
    assert aibrix["baseModel"] == stack["baseModel"] == labels["model"] == Settings().base_id
    assert (labels["model.aibrix.ai/port"], labels["model.aibrix.ai/engine"]) == ("8000", "vllm")
    assert labels["llm-d.ai/engine-type"] == "vllm"
    (port,) = container(render(chart, values))["ports"]
    assert port["name"] == "container-port"


def test_kserves_pod_is_one_that_kubernetes_takes_and_as_safe_as_the_charts(chart: helm_python.Chart) -> None:
    service = yaml.safe_load((ROOT / "deploy/kubernetes/kserve.yaml").read_text())
    spec = {name: value for name, value in service["spec"]["predictor"].items() if name != "minReplicas"}
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}, "1.37", strict=True
    )
    assert spec["containers"][0]["securityContext"] == container(render(chart, {"auth": KEY}))["securityContext"]
    assert spec["enableServiceLinks"] is False


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "requests need a key"),
        ({"auth": KEY | {"insecureNoAuth": True}}, "auth"),
        ({"auth": KEY, "replicaCont": 2}, "replicaCont"),
        ({"auth": KEY, "replicaCount": -1}, "replicaCount"),
        ({"auth": KEY, "settings": {"base": "embedded", "drain_seconds": 5}}, "drain_seconds"),
        ({"auth": KEY, "settings": {"base": "embedded", "api_key": "secret"}}, "api_key"),
        ({"auth": KEY, "data": {"size": "20 gigabytes"}}, "size"),
        ({"auth": KEY, "integrations": {"inferencePool": {"enabled": True}}}, "endpointPicker"),
    ],
)
def test_wrong_values_are_refused_by_name(chart: helm_python.Chart, values: dict[str, Any], told: str) -> None:
    def check() -> None:
        chart.validate_schema(values)
        chart.render(values, name="law")

    with pytest.raises(helm_python.HelmError, match=told):
        check()
