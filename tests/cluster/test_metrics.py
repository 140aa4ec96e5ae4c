"""The table of metrics: what it says is what Prometheus gets."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric

from cluster.metrics import MetricSpec, all_metrics

METRICS = all_metrics()


def exported(spec: MetricSpec) -> Metric:
    """The metric as prometheus_client exports it."""
    registry = CollectorRegistry()
    match spec.kind:
        case "counter":
            Counter(spec.exported, spec.help, spec.labels, registry=registry)
        case "gauge":
            Gauge(spec.exported, spec.help, spec.labels, registry=registry)
        case "histogram":
            Histogram(spec.exported, spec.help, spec.labels, buckets=spec.buckets, registry=registry)
    (metric,) = registry.collect()
    return metric


def test_every_metric_is_in_the_table_once() -> None:
    assert len({spec.name for spec in METRICS}) == len(METRICS) > 0


def test_names_are_what_prometheus_gets() -> None:
    for spec in METRICS:
        suffix = "_total" if spec.kind == "counter" else ""
        assert exported(spec).name + suffix == spec.exported
        assert spec.name.startswith("lora_")
        assert spec.exported.startswith("ray_lora_") == (spec.source != "scheduler")
        assert spec.name.endswith("_total") == (spec.kind == "counter")


def test_only_histograms_have_buckets_and_they_ascend() -> None:
    for spec in METRICS:
        assert bool(spec.buckets) == (spec.kind == "histogram")
        assert list(spec.buckets) == sorted(set(spec.buckets))
