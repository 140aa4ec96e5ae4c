"""Queue and job metrics, read from SQL at every scrape: right after any restart, and the same from every process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import cast

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cluster.metrics import (
    JOB_LOSS,
    JOB_STEP,
    JOB_STEP_SECONDS,
    JOB_TOKENS,
    JOB_VALIDATION_ACCURACY,
    JOB_VALIDATION_LOSS,
    JOBS,
    QUEUE_OLDEST_SECONDS,
    SESSIONS,
    MetricSpec,
)
from jobs.job import JobStatus, SessionState
from jobs.store.jobs import JobQueue

RECENT_SECONDS = 600.0
"""How long an ended job's figures stay: a few scrapes, so that its last step is seen but series do not pile up."""


class QueueCollector(Collector):
    """The jobs and sessions of one cluster, for a `prometheus_client` registry."""

    def __init__(self, queue: JobQueue, cluster: str) -> None:
        self._queue, self._cluster = queue, cluster

    def describe(self) -> list[Metric]:
        """Describe nothing: registering must not ask the database."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield one family a metric."""
        counts = _gauge(JOBS)
        for status, number in self._queue.counts(self._cluster).items():
            counts.add_metric([status], number)
        yield counts
        now = time.time()
        waiting = [job.created_at for job in self._queue.list(self._cluster, {JobStatus.QUEUED})]
        oldest = _gauge(QUEUE_OLDEST_SECONDS)
        oldest.add_metric([], now - min(waiting) if waiting else 0.0)
        yield oldest
        sessions = _gauge(SESSIONS)
        states = [session.state for session in self._queue.sessions(self._cluster)]
        for state in SessionState:
            if state is not SessionState.ENDED:
                sessions.add_metric([state], states.count(state))
        yield sessions
        yield from self._figures(now)

    def _figures(self, now: float) -> Iterator[Metric]:
        tokens = CounterMetricFamily(JOB_TOKENS.name, JOB_TOKENS.help, labels=JOB_TOKENS.labels)
        gauges = {
            "loss": _gauge(JOB_LOSS),
            "validation_loss": _gauge(JOB_VALIDATION_LOSS),
            "validation_accuracy": _gauge(JOB_VALIDATION_ACCURACY),
            "step": _gauge(JOB_STEP),
            "step_seconds": _gauge(JOB_STEP_SECONDS),
        }
        for job in self._queue.list(self._cluster):
            if job.progress is None or (job.finished_at is not None and now - job.finished_at > RECENT_SECONDS):
                continue
            tokens.add_metric([job.id, f"{job.base}:{job.spec.adapter}"], job.progress["tokens"])
            figures = cast(dict[str, float], job.progress)
            for field, gauge in gauges.items():
                if field in figures:  # a job without validation rows has no figures of them
                    gauge.add_metric([job.id], figures[field])
        yield tokens
        yield from gauges.values()


def _gauge(spec: MetricSpec) -> GaugeMetricFamily:
    return GaugeMetricFamily(spec.name, spec.help, labels=spec.labels)
