"""Alerts and dashboard ask for nothing that no process tells."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from k8s_manifests import Manifest, one
from prometheus_client.core import Metric

from cluster.metrics import ReplicaMetrics
from router.fakes import ManualClock
from router.metrics import Metrics
from router.state import Router

SCRAPED = {"pod", "namespace", "service", "job", "instance"}  # labels that Prometheus adds to what it asks


@pytest.fixture(scope="module")
def production(render: Any) -> list[Manifest]:
    documents: list[Manifest] = render("overlays/production")
    return documents


@pytest.fixture(scope="module")
def told() -> dict[str, set[str]]:
    """Labels of every series that a gateway exports, by its name."""
    replicas = ReplicaMetrics()
    replicas.figures = Router(ManualClock()).figures()
    metrics = Metrics()
    names = {labels["__name__"]: set(labels) - {"__name__"} for labels in _gauges(metrics)}
    for family in replicas.collect():
        suffix = "_total" if family.type == "counter" else ""
        names[family.name + suffix] = _labels(family)
    return names


def _gauges(metrics: Metrics) -> Iterator[dict[str, str]]:
    for instrument in vars(metrics).values():
        if not hasattr(instrument, "_labelnames"):
            continue
        labels = dict.fromkeys(instrument._labelnames, "")
        (family,) = instrument.describe()
        endings = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}[family.type]
        for ending in endings:
            more = {"le": ""} if ending == "_bucket" else {}
            yield labels | more | {"__name__": family.name + ending}


def _labels(family: Metric) -> set[str]:
    named = set(getattr(family, "_labelnames", ()))
    return named | {label for sample in family.samples for label in sample.labels}


def alerts(production: list[Manifest]) -> dict[str, str]:
    (group,) = one(production, "PrometheusRule")["spec"]["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


def dashboard(production: list[Manifest]) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(one(production, "ConfigMap", "understudy-dashboard")["data"]["understudy.json"])
    return made


def queries(production: list[Manifest]) -> dict[str, str]:
    found = dict(alerts(production))
    for panel in dashboard(production)["panels"]:
        for target in panel.get("targets", []):
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    variables = dashboard(production)["templating"]["list"]
    return found | {v["name"]: v["query"] for v in variables if v["type"] == "query"}


def test_every_query_names_a_series_that_exists(production: list[Manifest], told: dict[str, set[str]]) -> None:
    asked = queries(production)
    assert len(asked) > 40
    for title, query in asked.items():
        names = re.findall(r"understudy_\w+", query)
        assert names, title
        assert [name for name in names if name not in told] == [], title


def test_every_label_is_one_of_the_series(production: list[Manifest], told: dict[str, set[str]]) -> None:
    for title, query in queries(production).items():
        known = SCRAPED | set.union(*(told[name] for name in re.findall(r"understudy_\w+", query)))
        grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", query) for label in by.split(",")}
        matched = {
            label for braces in re.findall(r"\{([^}]*)\}", query) for label in re.findall(r"(\w+)\s*[=!]", braces)
        }
        assert grouped | matched <= known, title


def test_replicas_figures_are_counted_once(production: list[Manifest]) -> None:
    """Every gateway tells them: a sum over what is scraped would count them once for each."""
    for title, query in queries(production).items():
        for name in re.findall(r"understudy_(?:replica|expert|router)_\w+", query):
            before = query[: query.index(name)]
            assert re.search(
                r"(max|min)( by \([^)]*\))? \((rate\(|increase\()?$|(max|min)\((rate\()?$|values\($", before
            ), title


def test_what_an_alert_says_names_labels_that_it_has(production: list[Manifest], told: dict[str, set[str]]) -> None:
    (group,) = one(production, "PrometheusRule")["spec"]["groups"]
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("critical", "warning")
        for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]):
            grouped = re.findall(r"by \(([^)]*)\)", rule["expr"])
            assert label in SCRAPED or any(label in by for by in grouped), rule["alert"]


def test_panels_do_not_lie_on_each_other(production: list[Manifest]) -> None:
    panels = dashboard(production)["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for p in panels:
        at = p["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, p["title"]
        taken |= cells


def test_prometheus_finds_the_port(production: list[Manifest]) -> None:
    monitor = one(production, "ServiceMonitor")["spec"]
    (endpoint,) = monitor["endpoints"]
    found = [
        m for m in production
        if m["kind"] == "Service" and monitor["selector"]["matchLabels"].items() <= m["metadata"]["labels"].items()
        and endpoint["port"] in {p["name"] for p in m["spec"]["ports"]}
    ]  # fmt: skip
    assert [m["metadata"]["name"] for m in found] == ["understudy"], "one Service, or every series would be there twice"
