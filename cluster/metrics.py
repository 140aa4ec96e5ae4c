"""Every metric, once: name, kind, help, labels, buckets. Dashboards and alerts quote `exported`.

Names after the prefix `lora_` are vLLM's where vLLM has the thing, so that what operators know works here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Upper bounds in seconds. vLLM's for the same names, cut to what its dashboards draw.
FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
REQUEST_BUCKETS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0)
# A warm page cache parses a 40 MB adapter in 11 ms; a cold bucket takes seconds.
LOAD_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """One metric. `source` says who exports it: the scheduler, from SQL, or a Ray process through `ray.util.metrics`.

    Counters end in `_total`, as both libraries export them. Histograms observe seconds; `buckets` are ascending upper
    bounds.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    source: Literal["scheduler", "ray"]
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """The name in Prometheus: Ray puts `ray_` in front. Histograms add `_bucket`, `_sum` and `_count`."""
        return f"ray_{self.name}" if self.source == "ray" else self.name


JOBS = MetricSpec(
    name="lora_jobs", kind="gauge", source="scheduler", labels=("status",), help="Jobs in the queue's table, by status."
)
QUEUE_OLDEST_SECONDS = MetricSpec(
    name="lora_queue_oldest_seconds",
    kind="gauge",
    source="scheduler",
    help="Age of the oldest job that waits to run; 0 when none waits.",
)
SESSIONS = MetricSpec(
    name="lora_sessions", kind="gauge", source="scheduler", labels=("state",), help="Training sessions, by state."
)
JOB_TOKENS = MetricSpec(
    name="lora_job_tokens_total",
    kind="counter",
    source="scheduler",
    labels=("job", "adapter"),
    help="Tokens trained on, padding not counted.",
)
JOB_LOSS = MetricSpec(
    name="lora_job_loss",
    kind="gauge",
    source="scheduler",
    labels=("job",),
    help="Loss of a running job's last optimizer step, per supervised token.",
)
JOB_VALIDATION_LOSS = MetricSpec(
    name="lora_job_validation_loss",
    kind="gauge",
    source="scheduler",
    labels=("job",),
    help="Loss of a running job's validation rows at their last evaluation, per supervised token.",
)
JOB_VALIDATION_ACCURACY = MetricSpec(
    name="lora_job_validation_accuracy",
    kind="gauge",
    source="scheduler",
    labels=("job",),
    help="Share of a running job's supervised validation tokens that the model would have written, from 0 to 1.",
)
JOB_STEP = MetricSpec(
    name="lora_job_step",
    kind="gauge",
    source="scheduler",
    labels=("job",),
    help="Optimizer steps done by a running job.",
)
JOB_STEP_SECONDS = MetricSpec(
    name="lora_job_step_seconds",
    kind="gauge",
    source="scheduler",
    labels=("job",),
    help="Duration of a running job's last optimizer step.",
)

REQUESTS = MetricSpec(
    name="lora_requests_total",
    kind="counter",
    source="ray",
    labels=("base", "adapter", "finish_reason"),
    help="Requests answered.",
)
PROMPT_TOKENS = MetricSpec(
    name="lora_prompt_tokens_total", kind="counter", source="ray", labels=("base", "adapter"), help="Tokens of prompts."
)
GENERATION_TOKENS = MetricSpec(
    name="lora_generation_tokens_total",
    kind="counter",
    source="ray",
    labels=("base", "adapter"),
    help="Tokens generated.",
)
TIME_TO_FIRST_TOKEN_SECONDS = MetricSpec(
    name="lora_time_to_first_token_seconds",
    kind="histogram",
    source="ray",
    labels=("base",),
    buckets=FIRST_TOKEN_BUCKETS,
    help="From a request's arrival to its first token, the wait and the adapter's load included.",
)
E2E_REQUEST_LATENCY_SECONDS = MetricSpec(
    name="lora_e2e_request_latency_seconds",
    kind="histogram",
    source="ray",
    labels=("base",),
    buckets=REQUEST_BUCKETS,
    help="From a request's arrival to its last token.",
)
NUM_REQUESTS_RUNNING = MetricSpec(
    name="lora_num_requests_running", kind="gauge", source="ray", labels=("base",), help="Requests that generate now."
)
NUM_REQUESTS_WAITING = MetricSpec(
    name="lora_num_requests_waiting",
    kind="gauge",
    source="ray",
    labels=("base",),
    help="Requests that wait for a place in the batch.",
)
ADAPTER_LOAD_SECONDS = MetricSpec(
    name="lora_adapter_load_seconds",
    kind="histogram",
    source="ray",
    labels=("stage",),
    buckets=LOAD_BUCKETS,
    help="Time to make an adapter servable, by stage.",
)
ADAPTER_CACHE = MetricSpec(
    name="lora_adapter_cache_total",
    kind="counter",
    source="ray",
    labels=("result",),
    help="Requests for an adapter, by whether it was loaded already.",
)

METRICS = (
    JOBS,
    QUEUE_OLDEST_SECONDS,
    SESSIONS,
    JOB_TOKENS,
    JOB_LOSS,
    JOB_VALIDATION_LOSS,
    JOB_VALIDATION_ACCURACY,
    JOB_STEP,
    JOB_STEP_SECONDS,
    REQUESTS,
    PROMPT_TOKENS,
    GENERATION_TOKENS,
    TIME_TO_FIRST_TOKEN_SECONDS,
    E2E_REQUEST_LATENCY_SECONDS,
    NUM_REQUESTS_RUNNING,
    NUM_REQUESTS_WAITING,
    ADAPTER_LOAD_SECONDS,
    ADAPTER_CACHE,
)
