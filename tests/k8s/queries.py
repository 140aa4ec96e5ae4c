"""The queries of alerts and dashboards: which metrics they read, and by which labels."""

from __future__ import annotations

import json
import re
from collections import defaultdict

import promql_parser as promql
import yaml

from tests.k8s.objects import K8S, Object

MONITORING = K8S / "monitoring"
DASHBOARDS = tuple(sorted((MONITORING / "dashboards").glob("*.json")))
_VARIABLES = {"$__rate_interval": "1m"}
NODE_METRICS = {  # Ray's own
    "ray_node_cpu_utilization": set[str](),
    "ray_node_mem_used": set[str](),
    "ray_node_gpus_utilization": {"GpuIndex"},
    "ray_node_gram_used": {"GpuIndex"},
}


def rule_spec() -> Object:
    """What the PrometheusRule gives to Prometheus."""
    spec: Object = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]
    return spec


def rules() -> list[Object]:
    return [rule for group in rule_spec()["groups"] for rule in group["rules"]]


def alerts() -> list[str]:
    return [rule["alert"] for rule in rules() if "alert" in rule]


def panels() -> dict[str, list[str]]:
    """Dashboard and panel -> its queries, with Grafana's variables filled in as for all."""
    found = {}
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            filled = [re.sub(r"\$[a-z]+\b", ".*", _fill(target["expr"])) for target in panel["targets"]]
            found[f"{path.stem}: {panel['title']}"] = filled
    return found


def _fill(query: str) -> str:
    for name, value in _VARIABLES.items():
        query = query.replace(name, value)
    return query


def queries() -> list[str]:
    """All that alerts, recording rules and dashboards ask."""
    return [rule["expr"] for rule in rules()] + [query for panel in panels().values() for query in panel]


def labels_read(query: str) -> dict[str, set[str]]:
    """Metric -> the labels that a query selects or keeps of it."""
    read: dict[str, set[str]] = defaultdict(set)

    def visit(node: promql.Expr) -> None:
        if isinstance(node, promql.VectorSelector):
            read[node.name] |= {matcher.name for matcher in node.matchers.matchers}
        if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            assert node.modifier.type == promql.AggModifierType.By, "without() drops what the scrape adds"
            for name in labels_read(node.expr.prettify()):
                read[name] |= set(node.modifier.labels)

    promql.walk(promql.parse(query), visit)
    return dict(read)
