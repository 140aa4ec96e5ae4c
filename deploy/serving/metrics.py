"""The serving metrics of `cluster/metrics.py` as Ray exports them, one object for each spec and process."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from ray.util.metrics import Counter, Gauge, Histogram

from cluster import metrics
from cluster.metrics import MetricSpec

_GAUGE_SECONDS = 5.0  # Ray drops a gauge that was not set for 20 s
_RATE_SECONDS = 10


def counter(spec: MetricSpec) -> Counter:
    assert spec.kind == "counter"
    return Counter(spec.name, spec.help, spec.labels)


def histogram(spec: MetricSpec) -> Histogram:
    assert spec.kind == "histogram"
    return Histogram(spec.name, spec.help, list(spec.buckets), spec.labels)


class QueueGauges:
    """Requests running and waiting on one base; call `show` more often than Ray forgets."""

    def __init__(self, base: str) -> None:
        specs = (metrics.NUM_REQUESTS_RUNNING, metrics.NUM_REQUESTS_WAITING)
        self._gauges = [Gauge(spec.name, spec.help, spec.labels) for spec in specs]
        self._tags = {"base": base}
        self._shown: tuple[int, int] | None = None
        self._at = 0.0

    @property
    def shown(self) -> tuple[int, int]:
        """Requests running and waiting, of at most a few seconds ago."""
        return self._shown or (0, 0)

    def show(self, running: int, waiting: int) -> None:
        """Set both, where they changed or a few seconds have passed."""
        now = time.monotonic()
        if (running, waiting) != self._shown or now - self._at >= _GAUGE_SECONDS:
            self._shown, self._at = (running, waiting), now
            for gauge, value in zip(self._gauges, self._shown, strict=True):
                gauge.set(value, tags=self._tags)


class TokenRate:
    """Tokens a second, over the last ten seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts: deque[list[int]] = deque(maxlen=_RATE_SECONDS)  # [second, tokens], where there were any

    def add(self, tokens: int) -> None:
        second = int(self._clock())
        if not self._counts or self._counts[-1][0] != second:
            self._counts.append([second, 0])
        self._counts[-1][1] += tokens

    @property
    def per_second(self) -> float:
        since = int(self._clock()) - _RATE_SECONDS
        return sum(tokens for second, tokens in self._counts if second > since) / _RATE_SECONDS


class ServingMetrics:
    """What an adapter server counts and times."""

    def __init__(self, base: str) -> None:
        self._base = base
        self.rate = TokenRate()
        self._requests = counter(metrics.REQUESTS)
        self._prompt_tokens = counter(metrics.PROMPT_TOKENS)
        self._generation_tokens = counter(metrics.GENERATION_TOKENS)
        self._first_token = histogram(metrics.TIME_TO_FIRST_TOKEN_SECONDS)
        self._latency = histogram(metrics.E2E_REQUEST_LATENCY_SECONDS)
        self._load = histogram(metrics.ADAPTER_LOAD_SECONDS)
        self._cache = counter(metrics.ADAPTER_CACHE)
        self._freshness = histogram(metrics.ADAPTER_FRESHNESS_SECONDS)
        self._failures = counter(metrics.ADAPTER_LOAD_FAILURES)

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds, tags={"base": self._base})

    def answered(self, adapter: str, reason: str, seconds: float, prompt_tokens: int, tokens: int) -> None:
        """Count a request that is over; `reason` is a finish reason, `abort` or `error`."""
        tags = {"base": self._base, "adapter": adapter}
        self._requests.inc(1, tags={**tags, "finish_reason": reason})
        self._prompt_tokens.inc(prompt_tokens, tags=tags)
        if tokens:
            self._generation_tokens.inc(tokens, tags=tags)
        self._latency.observe(seconds, tags={"base": self._base})

    def adapter_stage(self, stage: str, seconds: float) -> None:
        self._load.observe(seconds, tags={"stage": stage})

    def published(self, seconds: float) -> None:
        self._freshness.observe(seconds, tags={"base": self._base})

    def adapter_cache(self, tier: str, result: str) -> None:
        """Count a `hit`, `miss` or `eviction`."""
        self._cache.inc(1, tags={"tier": tier, "result": result})

    def load_failed(self, reason: str) -> None:
        """Count an adapter that is `refused`, `damaged` or `unavailable`."""
        self._failures.inc(1, tags={"base": self._base, "reason": reason})
