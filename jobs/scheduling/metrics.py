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
    SCHEDULER_LEADER,
    SESSION_LAUNCH_OLDEST_SECONDS,
    SESSIONS,
    MetricSpec,
)
from jobs.job import SessionState, lease_name
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
        since = self._queue.oldest_queued(self._cluster)
        oldest = _gauge(QUEUE_OLDEST_SECONDS)
        oldest.add_metric([], 0.0 if since is None else now - since)
        yield oldest
        lease = self._queue.lease(lease_name(self._cluster))
        leader = _gauge(SCHEDULER_LEADER)
        leader.add_metric([], float(lease is not None and lease.valid))
        yield leader
        yield from self._sessions(now)
        yield from self._figures(now)

    def _sessions(self, now: float) -> Iterator[Metric]:
        alive = self._queue.sessions(self._cluster)
        sessions, launching = _gauge(SESSIONS), _gauge(SESSION_LAUNCH_OLDEST_SECONDS)
        states = [session.state for session in alive]
        for state in SessionState:
            if state is not SessionState.ENDED:
                sessions.add_metric([state], states.count(state))
        launching.add_metric([], max((now - session.created_at for session in alive if session.launching), default=0.0))
        yield sessions
        yield launching

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
            if job.progress is None or job.is_sweep:  # whose figures are those of its best trial
                continue
            if job.finished_at is not None and now - job.finished_at > RECENT_SECONDS:
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
