"""The metrics of every optimizer step, gathered in rank 0 and sent by a thread of their own beside the next steps."""

from __future__ import annotations

import logging
import threading
import time

import psutil
import torch

from jobs.job import JobProgress, JobSteps, StepMetrics
from jobs.session.messages import RanksMailbox, StepsDone

log = logging.getLogger("lora.rank")

SEND_SECONDS = 0.25
HALF_LIFE = 60.0  # in seconds of computing, of what the session's tokens/s remember


class StepReporter:
    """What rank 0 tells of the steps of all jobs. A step that is told of waits for nothing but a lock that nobody holds
    for longer than it takes to take what was gathered.
    """

    def __init__(self, mailbox: RanksMailbox) -> None:
        self._mailbox = mailbox
        self._gathering, self._sending = threading.Lock(), threading.Lock()
        self._progress: dict[str, JobProgress] = {}
        self._steps: dict[str, list[StepMetrics]] = {}
        self._tokens = self._seconds = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stepped(self, job_id: str, progress: JobProgress, metrics: StepMetrics) -> None:
        """Gather what a job has come to with a step, and that step's metrics."""
        with self._gathering:
            self._progress[job_id] = progress
            self._steps.setdefault(job_id, []).append(metrics)

    def computed(self, tokens: int, seconds: float) -> None:
        """Count what the ranks have trained on in these seconds."""
        remembered = 0.5 ** (seconds / HALF_LIFE)
        self._tokens = self._tokens * remembered + tokens
        self._seconds = self._seconds * remembered + seconds

    def flush(self) -> None:
        """Return once all that was gathered has been delivered: before what comes after it is."""
        with self._sending:
            with self._gathering:
                progress, self._progress, steps, self._steps = self._progress, {}, self._steps, {}
            if steps:
                memory = {"memory_bytes": float(_memory_bytes())}
                jobs = tuple(
                    JobSteps(job, progress[job], tuple(one.with_figures(memory) for one in steps[job])) for job in steps
                )
                pace = self._tokens / self._seconds if self._tokens else None
                self._mailbox.deliver(StepsDone(jobs, pace))

    def stop(self) -> None:
        """Send what is left, and end the thread."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(SEND_SECONDS):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        try:
            self.flush()
        except Exception:  # the driver is gone, or will be: training is not stopped by what is told of it
            log.exception("event=metrics_not_sent")
            time.sleep(SEND_SECONDS)


def _memory_bytes() -> int:
    """What this rank's process has taken of its device at most, or holds of a CPU's memory, for all its jobs."""
    if torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)
