"""Every metric, once: name, kind, source, help, labels, buckets. Dashboards and alerts quote `exported`.

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


@dataclass(frozen=True)
class MetricSpec:
    """One metric. `source` says who exports it: the scheduler, from SQL, or a Ray process through `ray.util.metrics`.

    Counters end in `_total`, as both libraries export them. Histograms observe seconds; `buckets` are ascending upper
    bounds.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    source: Literal["scheduler", "ray"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """The name in Prometheus: Ray puts `ray_` in front. Histograms add `_bucket`, `_sum` and `_count`."""
        return f"ray_{self.name}" if self.source == "ray" else self.name


JOBS = MetricSpec("lora_jobs", "gauge", "scheduler", "Jobs in the queue's table, by status.", ("status",))
QUEUE_OLDEST_SECONDS = MetricSpec(
    "lora_queue_oldest_seconds", "gauge", "scheduler", "Age of the oldest job that waits to run; 0 when none waits."
)
SESSIONS = MetricSpec("lora_sessions", "gauge", "scheduler", "Training sessions, by state.", ("state",))
JOB_TOKENS = MetricSpec(
    "lora_job_tokens_total", "counter", "scheduler", "Tokens trained on, padding not counted.", ("job", "adapter")
)
JOB_LOSS = MetricSpec(
    "lora_job_loss",
    "gauge",
    "scheduler",
    "Loss of a running job's last optimizer step, per supervised token.",
    ("job",),
)
JOB_VALIDATION_LOSS = MetricSpec(
    "lora_job_validation_loss",
    "gauge",
    "scheduler",
    "Loss of a running job's validation rows at their last evaluation, per supervised token.",
    ("job",),
)
JOB_VALIDATION_ACCURACY = MetricSpec(
    "lora_job_validation_accuracy",
    "gauge",
    "scheduler",
    "Share of a running job's supervised validation tokens that the model would have written, from 0 to 1.",
    ("job",),
)
JOB_STEP = MetricSpec("lora_job_step", "gauge", "scheduler", "Optimizer steps done by a running job.", ("job",))
JOB_STEP_SECONDS = MetricSpec(
    "lora_job_step_seconds", "gauge", "scheduler", "Duration of a running job's last optimizer step.", ("job",)
)

REQUESTS = MetricSpec(
    "lora_requests_total", "counter", "ray", "Requests answered.", ("base", "adapter", "finish_reason")
)
PROMPT_TOKENS = MetricSpec("lora_prompt_tokens_total", "counter", "ray", "Tokens of prompts.", ("base", "adapter"))
GENERATION_TOKENS = MetricSpec(
    "lora_generation_tokens_total", "counter", "ray", "Tokens generated.", ("base", "adapter")
)
TIME_TO_FIRST_TOKEN_SECONDS = MetricSpec(
    "lora_time_to_first_token_seconds",
    "histogram",
    "ray",
    "From a request's arrival to its first token, the wait and the adapter's load included.",
    ("base",),
    FIRST_TOKEN_BUCKETS,
)
E2E_REQUEST_LATENCY_SECONDS = MetricSpec(
    "lora_e2e_request_latency_seconds",
    "histogram",
    "ray",
    "From a request's arrival to its last token.",
    ("base",),
    REQUEST_BUCKETS,
)
NUM_REQUESTS_RUNNING = MetricSpec("lora_num_requests_running", "gauge", "ray", "Requests that generate now.", ("base",))
NUM_REQUESTS_WAITING = MetricSpec(
    "lora_num_requests_waiting", "gauge", "ray", "Requests that wait for a place in the batch.", ("base",)
)
ADAPTER_LOAD_SECONDS = MetricSpec(
    "lora_adapter_load_seconds",
    "histogram",
    "ray",
    "Time to make an adapter servable, by stage.",
    ("stage",),
    LOAD_BUCKETS,
)
ADAPTER_FRESHNESS_SECONDS = MetricSpec(
    "lora_adapter_freshness_seconds",
    "histogram",
    "ray",
    "From an adapter's publication until it is loaded.",
    ("base",),
    LOAD_BUCKETS,
)
ADAPTER_CACHE = MetricSpec(
    "lora_adapter_cache_total",
    "counter",
    "ray",
    "Adapters looked for in a tier of memory (hit, miss), and given up to make room there (eviction).",
    ("tier", "result"),
)
