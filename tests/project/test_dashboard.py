"""What the dashboard and the alerts ask Prometheus for is there to be asked for."""

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import yaml

from repository import ROOT
from swaplora_adapters.registry.card import AdapterState
from swaplora_server.engine.request import FinishReason
from swaplora_server.engine.snapshot import Snapshot
from swaplora_server.kernels.step import StepForm
from swaplora_server.service.metrics.metrics import Metrics
from swaplora_server.service.metrics.records import GenerationRecord, Outcome, ServerState

DEPLOY = ROOT / "deploy"
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
LABELS = re.compile(r"\{[^{}]*\}|\[[^\[\]]*\]|\b(?:by|without|on|ignoring)\s*\([^()]*\)")  # no metric stands in these
WORD = re.compile(r"(?<![\w:.])[A-Za-z_:][\w:]*(?!\s*\()(?![\w:])")
SELECTED = re.compile(r"([A-Za-z_:][\w:]*)\{([^{}]*)\}")
OPERATORS = {"and", "bool", "by", "or", "unless", "without"}
ADDED = {"instance", "job", "le"}  # by Prometheus, and by histograms


def metrics_of(expression: str) -> set[str]:
    """The metrics that PromQL names: words that are no function, label or operator."""
    return set(WORD.findall(LABELS.sub(" ", STRING.sub('""', expression)))) - OPERATORS


def labels_of(expression: str) -> set[str]:
    """The labels that it selects or groups by."""
    text = STRING.sub('""', expression)
    grouped = re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^()]*)\)", text)
    selected = [re.sub(r'[!=~]+""', "", labels) for _, labels in SELECTED.findall(text)]
    return {label.strip() for labels in [*grouped, *selected] for label in labels.split(",") if label.strip()}


def panels() -> list[dict[str, Any]]:
    dashboard = json.loads((DEPLOY / "chart/dashboards/swaplora.json").read_text())
    found: list[dict[str, Any]] = dashboard["panels"]
    return found


def expressions() -> Iterator[str]:
    yield from (target["expr"] for panel in panels() for target in panel.get("targets", []))
    groups = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())["groups"]
    yield from (rule["expr"] for group in groups for rule in group["rules"])


@pytest.fixture(scope="module")
def told() -> dict[str, set[str]]:
    """Each sample that a server has, by name, with its labels, after an adapter was used."""
    counts: dict[str, Any] = {count.name: 0 for count in fields(Snapshot)} | {"num_steps": dict.fromkeys(StepForm, 0)}
    state = ServerState(Snapshot(**counts), 0, 0, 0, [AdapterState("a", 1, "disk", False, False)], tenants={"": 1})
    metrics = Metrics(lambda: state, "base")
    metrics.count_request("/health", 200)
    metrics.adapters.loaded("a", {"read": 1.0})
    metrics.observe(
        GenerationRecord(
            outcome=Outcome.COMPLETED,
            adapters=("a",),
            num_prompt_tokens=1,
            num_generated=(2,),
            finish_reasons=(FinishReason.LENGTH,),
            max_tokens=2,
            seconds=1,
            seconds_for_adapters=0,
            seconds_queued=0,
            seconds_to_first=0.5,
            seconds_to_last=1,
        )
    )
    labels: dict[str, set[str]] = {"up": set()}  # Prometheus's own
    for family in metrics.registry.collect():
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def test_promql_is_taken_apart() -> None:
    query = 'histogram_quantile(0.95, sum by (le, a) (rate(x_bucket{b=~"c{d", e!="f"}[5m]))) > 0.5 * y and up == 1'
    assert metrics_of(query) == {"x_bucket", "y", "up"}
    assert labels_of(query) == {"le", "a", "b", "e"}


def test_every_metric_and_label_that_is_asked_for_is_told(told: dict[str, set[str]]) -> None:
    asked = list(expressions())
    assert len(asked) > 40
    assert {metric for expression in asked for metric in metrics_of(expression)} - told.keys() == set()
    for expression in asked:
        known = set[str]().union(*(told[metric] for metric in metrics_of(expression)))
        assert labels_of(expression) - known - ADDED == set(), expression


def test_every_panel_asks_for_something_and_has_a_place_of_its_own() -> None:
    asking = [panel for panel in panels() if panel["type"] != "row"]
    assert all(panel["targets"] for panel in asking)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels()]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_each_metric_of_its_own_that_counts_load_is_on_the_dashboard(told: dict[str, set[str]]) -> None:
    shown = {metric for panel in panels() for t in panel.get("targets", []) for metric in metrics_of(t["expr"])}
    roots = {re.sub(r"_(?:bucket|sum|count)$", "", metric) for metric in shown}
    own = {re.sub(r"_(?:bucket|sum|count)$", "", name) for name in told if name.startswith("swaplora_")}
    assert own - roots == {"swaplora_info"}  # which the choice of servers reads


def test_the_scrape_has_a_key_and_every_file_of_it_is_where_it_is_looked_for() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    scrape = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    (job,) = scrape["scrape_configs"]
    (secret,) = compose["services"]["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert compose["secrets"][secret] == {"environment": "SWAPLORA_API_KEY"}
    assert scrape["rule_files"] == ["rules.yml"]
    mounts = dict(volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"])
    assert all((DEPLOY / path).is_dir() for path in mounts if path.startswith("./"))
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/swaplora.yaml").read_text())
    assert provider["providers"][0]["options"]["path"] == mounts["./chart/dashboards"]
