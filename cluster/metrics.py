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
    """One metric. `source` says who exports it: the scheduler, from SQL, or through `ray.util.metrics` the drivers of
    sessions or the processes of serving.

    Counters end in `_total`, as both libraries export them. Histograms observe seconds; `buckets` are ascending upper
    bounds.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    source: Literal["scheduler", "session", "serving"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """The name in Prometheus: Ray puts `ray_` in front. Histograms add `_bucket`, `_sum` and `_count`."""
        return self.name if self.source == "scheduler" else f"ray_{self.name}"


JOBS = MetricSpec("lora_jobs", "gauge", "scheduler", "Jobs in the queue's table, by status.", ("status",))
QUEUE_OLDEST_SECONDS = MetricSpec(
    "lora_queue_oldest_seconds", "gauge", "scheduler", "Age of the oldest job that waits to run; 0 when none waits."
)
SCHEDULER_LEADER = MetricSpec(
    "lora_scheduler_leader", "gauge", "scheduler", "1 while some scheduler of the cluster holds its lease, else 0."
)
SESSIONS = MetricSpec("lora_sessions", "gauge", "scheduler", "Training sessions, by state.", ("state",))
SESSION_LAUNCH_OLDEST_SECONDS = MetricSpec(
    "lora_session_launch_oldest_seconds",
    "gauge",
    "scheduler",
    "Age of the oldest session of which the driver is not up; 0 when there is none.",
)
JOB_TOKENS = MetricSpec(
    "lora_job_tokens_total", "counter", "scheduler", "Tokens trained on, padding not counted.", ("job", "adapter")
)
JOB_LOSS = MetricSpec(
    "lora_job_loss",
    "gauge",
    "scheduler",
    "Loss of a running job's last optimizer step, per supervised token or pair of answers.",
    ("job",),
)
JOB_VALIDATION_LOSS = MetricSpec(
    "lora_job_validation_loss",
    "gauge",
    "scheduler",
    "Loss of a running job's validation rows at their last evaluation, per supervised token or pair of answers.",
    ("job",),
)
JOB_VALIDATION_ACCURACY = MetricSpec(
    "lora_job_validation_accuracy",
    "gauge",
    "scheduler",
    "Share of a running job's supervised validation tokens that the model would have written, or of pairs whose chosen"
    " answer has the larger reward, from 0 to 1.",
    ("job",),
)
JOB_STEP = MetricSpec("lora_job_step", "gauge", "scheduler", "Optimizer steps done by a running job.", ("job",))
JOB_STEP_SECONDS = MetricSpec(
    "lora_job_step_seconds", "gauge", "scheduler", "Duration of a running job's last optimizer step.", ("job",)
)
JOB_CHECKPOINT_AGE_SECONDS = MetricSpec(
    "lora_job_checkpoint_age_seconds",
    "gauge",
    "session",
    "Since a running job's last committed checkpoint, or since its session took it: what a lost rank would cost.",
    ("job",),
)
SESSION_FAILED_ROUNDS = MetricSpec(
    "lora_session_failed_rounds_total",
    "counter",
    "session",
    "Rounds of a session's driver that failed because database or storage did not answer; it tries again.",
)

API_REQUESTS = MetricSpec(
    "lora_api_requests_total", "counter", "serving", "HTTP requests that the gateway answered.", ("route", "status")
)
API_ERRORS = MetricSpec(
    "lora_api_errors_total",
    "counter",
    "serving",
    "Requests that failed through no fault of the client's, by code.",
    ("code",),
)
REQUESTS = MetricSpec(
    "lora_requests_total", "counter", "serving", "Requests answered.", ("base", "adapter", "finish_reason")
)
PROMPT_TOKENS = MetricSpec("lora_prompt_tokens_total", "counter", "serving", "Tokens of prompts.", ("base", "adapter"))
GENERATION_TOKENS = MetricSpec(
    "lora_generation_tokens_total", "counter", "serving", "Tokens generated.", ("base", "adapter")
)
TIME_TO_FIRST_TOKEN_SECONDS = MetricSpec(
    "lora_time_to_first_token_seconds",
    "histogram",
    "serving",
    "From a request's arrival to its first token, the wait and the adapter's load included.",
    ("base",),
    FIRST_TOKEN_BUCKETS,
)
E2E_REQUEST_LATENCY_SECONDS = MetricSpec(
    "lora_e2e_request_latency_seconds",
    "histogram",
    "serving",
    "From a request's arrival to its last token.",
    ("base",),
    REQUEST_BUCKETS,
)
NUM_REQUESTS_RUNNING = MetricSpec(
    "lora_num_requests_running", "gauge", "serving", "Requests that generate now.", ("base",)
)
NUM_REQUESTS_WAITING = MetricSpec(
    "lora_num_requests_waiting", "gauge", "serving", "Requests that wait for a place in the batch.", ("base",)
)
ADAPTER_LOAD_SECONDS = MetricSpec(
    "lora_adapter_load_seconds",
    "histogram",
    "serving",
    "Time until an adapter is servable, by stage.",
    ("stage",),
    LOAD_BUCKETS,
)
ADAPTER_FRESHNESS_SECONDS = MetricSpec(
    "lora_adapter_freshness_seconds",
    "histogram",
    "serving",
    "From an adapter's publication until it is loaded.",
    ("base",),
    LOAD_BUCKETS,
)
ADAPTER_CACHE = MetricSpec(
    "lora_adapter_cache_total",
    "counter",
    "serving",
    "Adapters looked for in a tier of memory (hit, miss), and given up to make room there (eviction).",
    ("tier", "result"),
)
ADAPTER_LOAD_FAILURES = MetricSpec(
    "lora_adapter_load_failures_total",
    "counter",
    "serving",
    "Adapters that a replica does not serve: refused (another base, or other probes), damaged or unavailable.",
    ("base", "reason"),
)


def all_metrics() -> list[MetricSpec]:
    """Return the table, in the order of this file."""
    return [value for value in globals().values() if isinstance(value, MetricSpec)]


def table() -> str:
    """Return the table for people, as k8s/README.md has it."""
    rows = ["| metric | kind | labels | what |", "|---|---|---|---|"]
    rows += [
        f"| `{spec.exported}` | {spec.kind} | {', '.join(spec.labels) or '-'} | {spec.help} |" for spec in all_metrics()
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
