"""What the metrics of every optimizer step cost at 100 steps a second: `python -m tests.bench.step_metrics [seconds]`.

A rank that trains is a loop which computes for the rest of 10 ms and then tells of a step as ranks do; its thread sends
to the mailbox of a driver, an actor, from which this process writes to SQLite as a driver does. The cost is what the
step itself waits for, and all that the thread computes: while it does, Python's lock may be taken from the next step.
A figure is read by the queue's own query, every 20 ms, as whoever draws a curve would.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ray

from jobs.job import SessionKey, SessionState, StepMetrics
from jobs.session.messages import DesiredJobs, Mailbox, RanksMailbox, StepsDone
from jobs.session.step_reporter import StepReporter
from jobs.spec import JobSpec
from jobs.store.jobs import JobQueue

STEP_SECONDS, DRIVER_SECONDS, READ_SECONDS = 0.01, 0.5, 0.02
FIGURES = {"train_loss": 1.2345678, "learning_rate": 1.9e-4, "grad_norm": 0.5432, "tokens_per_second": 12345.6}
PROGRESS: Any = {
    "steps": 10_000, "loss": 1.0, "first_loss": 2.0, "tokens": 1, "supervised_tokens": 1, "tokens_per_second": 1.0,
    "step_seconds": 0.01, "trainable_parameters": 1, "base_parameters": 1, "base_bytes": 1,
}  # fmt: skip


class TimedReporter(StepReporter):
    """It counts the seconds that its thread computes."""

    computed_seconds = 0.0

    def _run(self) -> None:
        super()._run()
        self.computed_seconds = time.thread_time()


def running_job(queue: JobQueue) -> tuple[str, str]:
    """A job and the session that trains it."""
    spec = JobSpec.model_validate({"base_model": "base", "dataset": "/rows.jsonl", "adapter": "a"})
    job, _ = queue.submit(spec, cluster="c", base="base", dataset_sha="d", code_version="v")
    session = queue.create_session(SessionKey("base", "auto", 1), "c")
    assert session is not None
    queue.session_move(session.id, SessionState.LAUNCHING, SessionState.RUNNING, reason="up", fence=1)
    assert queue.assign(job.id, session.id)
    return job.id, session.id


def drive(handle: Any, url: str, session_id: str, ended: threading.Event) -> None:
    """Write what is reported, in rounds as a driver makes them."""
    queue = JobQueue(url)
    while not ended.wait(DRIVER_SECONDS):
        _, reports = ray.get(handle.exchange.remote(DesiredJobs()))
        for report in reports:
            assert isinstance(report, StepsDone)
            assert queue.record_steps(session_id, 1, report.jobs, report.tokens_per_second)


def read(url: str, job_id: str, ended: threading.Event, delays: list[float]) -> None:
    """Note how long after its end each step can be read."""
    queue, last = JobQueue(url), 0
    while not ended.wait(READ_SECONDS):
        steps = queue.step_metrics(job_id, after=last)
        delays += [time.time() - one.at for one in steps]
        last = steps[-1].step if steps else last


def train(handle: Any, job_id: str, seconds: float) -> tuple[list[float], TimedReporter]:
    """Return what each step waited for, and the reporter."""
    reporter, waits = TimedReporter(RanksMailbox(handle)), []
    reporter.start()
    for step in range(1, int(seconds / STEP_SECONDS) + 1):
        ends = time.perf_counter() + STEP_SECONDS
        began = time.perf_counter()
        reporter.stepped(job_id, PROGRESS | {"step": step}, StepMetrics(step, time.time(), {**FIGURES}))
        reporter.computed(1024, STEP_SECONDS)
        waits.append(time.perf_counter() - began)
        time.sleep(max(0.0, ends - time.perf_counter()))
    reporter.stop()
    return waits, reporter


def main(seconds: float) -> None:
    """Measure and print."""
    ray.init(num_cpus=1, include_dashboard=False, logging_level="warning")
    handle = ray.remote(Mailbox).options(num_cpus=0, max_concurrency=8).remote()
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'lora.db'}"
        job_id, session_id = running_job(JobQueue(url))
        ended, delays = threading.Event(), list[float]()
        others = [
            threading.Thread(target=drive, args=(handle, url, session_id, ended)),
            threading.Thread(target=read, args=(url, job_id, ended, delays)),
        ]
        for other in others:
            other.start()
        began = time.perf_counter()
        waits, reporter = train(handle, job_id, seconds)
        took = time.perf_counter() - began
        time.sleep(2 * DRIVER_SECONDS)
        ended.set()
        for other in others:
            other.join()
        kept = len(JobQueue(url).step_metrics(job_id))
    ray.shutdown()
    delays.sort()
    row = {
        "bench": "step_metrics",
        "steps": len(waits),
        "steps_per_second": round(len(waits) / took, 1),
        "step_waits_us": round(statistics.mean(waits) * 1e6, 1),
        "thread_us_a_step": round(reporter.computed_seconds / len(waits) * 1e6, 1),
        "share_of_step": round((sum(waits) + reporter.computed_seconds) / took, 5),
        "readable_after_s": {"p50": round(statistics.median(delays), 2), "most": round(delays[-1], 2)},
        "read": len(delays),
        "rows_kept": kept,
    }
    for name, value in row.items():
        print(f"{name:<20} {value}")
    print("\n" + json.dumps(row))


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 30.0)
