"""Alerts, dashboards and the runbook: they name what there is, and every alert fires and is silent when it should."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.metrics import all_metrics, table
from tests.k8s.objects import K8S
from tests.k8s.queries import DASHBOARDS, NODE_METRICS, alerts, labels_read, panels, queries, rule_spec, rules

README = (K8S / "README.md").read_text()
CASES: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "alerts.yaml").read_text())


def promtool(*arguments: str | Path) -> str:
    """What it says where it finds nothing wrong."""
    program = shutil.which("promtool")
    if program is None:
        missing = "no promtool here: apt-get install prometheus"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def known_labels() -> dict[str, set[str]]:
    """Metric as Prometheus has it -> its labels, and those of the scrape."""
    known = dict(NODE_METRICS)
    for spec in all_metrics():
        names = [""] if spec.kind != "histogram" else ["_bucket", "_sum", "_count"]
        known |= {spec.exported + end: {*spec.labels, *(["le"] if end == "_bucket" else [])} for end in names}
    known |= {rule["record"]: set() for rule in rules() if "record" in rule}
    return {name: labels | {"instance"} for name, labels in known.items()}


def query_problems(query: str) -> list[str]:
    """Metrics and labels in a query that nothing exports."""
    known = known_labels()
    return [
        f"{name} has no label {label}" if name in known else f"nothing exports {name}"
        for name, labels in labels_read(query).items()
        for label in sorted(labels - known.get(name, set())) or ([] if name in known else ["any"])
    ]


def test_queries_name_what_is_exported() -> None:
    assert {query: found for query in queries() if (found := query_problems(query))} == {}
    assert query_problems("sum(rate(lora_job_token_total[5m]))") == ["nothing exports lora_job_token_total"]
    assert query_problems("max by (adapter) (lora_job_loss)") == ["lora_job_loss has no label adapter"]
    unused = {spec.exported for spec in all_metrics()} - {
        name.removesuffix("_bucket") for query in queries() for name in labels_read(query)
    }
    assert unused == set(), "on no dashboard and in no alert"


def test_dashboards_lay_panels_beside_each_other() -> None:
    assert len({json.loads(path.read_text())["uid"] for path in DASHBOARDS}) == len(DASHBOARDS) == 4
    assert len(panels()) > 25
    for path in DASHBOARDS:
        cells = set[tuple[int, int]]()
        for panel in json.loads(path.read_text())["panels"]:
            at = panel["gridPos"]
            own = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
            assert not own & cells and at["x"] + at["w"] <= 24, (path.stem, panel["title"])
            cells |= own


def test_the_runbook_has_every_metric_and_every_alert() -> None:
    assert table() in README, "print it with python -m cluster.metrics"
    headings = [line.removeprefix("### ") for line in README.splitlines() if line.startswith("### Lora")]
    assert headings == alerts()


def test_every_alert_fires_and_is_silent(tmp_path: Path) -> None:
    assert list(CASES) == alerts()
    (tmp_path / "rules.yaml").write_text(json.dumps(rule_spec()))
    promtool("check", "rules", tmp_path / "rules.yaml")
    bare = rule_spec()
    severities = {}
    for rule in [rule for group in bare["groups"] for rule in group["rules"] if "alert" in rule]:
        del rule["annotations"]  # promtool would want each by heart
        severities[rule["alert"]] = rule["labels"]
    (tmp_path / "bare.yaml").write_text(json.dumps(bare))
    tests = [
        {
            "name": f"{alert} {kind}",
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in case[kind].items()],
            "alert_rule_test": [
                {
                    "alertname": alert,
                    "eval_time": case["after"],
                    "exp_alerts": [{"exp_labels": severities[alert] | case.get("labels", {})}]
                    if kind == "fires"
                    else [],
                }
            ],
        }
        for alert, case in CASES.items()
        for kind in ("fires", "silent")
    ]
    (tmp_path / "tests.yaml").write_text(json.dumps({"rule_files": ["bare.yaml"], "tests": tests}))
    promtool("test", "rules", tmp_path / "tests.yaml")
