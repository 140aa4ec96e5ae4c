"""What a session's driver exports through Ray: how old checkpoints are, and rounds that failed."""

from __future__ import annotations

import time
from collections.abc import Iterable

from ray.util.metrics import Counter, Gauge

from cluster import metrics


class SessionMetrics:
    """Of one driver; call `show` every few seconds, since Ray drops a gauge that was not set for 20 s."""

    def __init__(self) -> None:
        age, failed = metrics.JOB_CHECKPOINT_AGE_SECONDS, metrics.SESSION_FAILED_ROUNDS
        self._age = Gauge(age.name, age.help, age.labels)
        self._failed = Counter(failed.name, failed.help, failed.labels)
        self._since: dict[str, float] = {}

    def committed(self, job_id: str) -> None:
        """A checkpoint of this job is there."""
        self._since[job_id] = time.monotonic()

    def show(self, running: Iterable[str]) -> None:
        """Set the age of each running job's checkpoint; jobs that are new here begin now."""
        now = time.monotonic()
        self._since = {job_id: self._since.get(job_id, now) for job_id in running}
        for job_id, since in self._since.items():
            self._age.set(now - since, tags={"job": job_id})

    def round_failed(self) -> None:
        self._failed.inc()
