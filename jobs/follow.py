"""Following a job to its end: its history and progress, why it waits, what came of it; a Ctrl-C is heard at once."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from jobs.errors import JobError
from jobs.job import TERMINAL, Job, JobStatus, lease_name
from jobs.job_log import JobLog, LogLine
from jobs.job_report import accuracy_line
from jobs.screen import ProgressBar
from jobs.store.jobs import JobQueue

POLL_SECONDS = 0.5
WATCH_SECONDS = 10.0
PATIENCE_SECONDS = 3.0  # without a scheduler, before that is said: one that starts takes longer than to say so


def follow(
    queue: JobQueue,
    job_id: str,
    watch: Callable[[], None] | None = None,
    *,
    log: JobLog | None = None,
    say: Callable[[LogLine], None] | None = None,
) -> int:
    """Print a job's log (None: its history alone) and progress until it ends; 0 only if it succeeded. `watch`, which
    sees to it that there is a scheduler, is called now and then while it waits; `say` prints lines in another form, and
    then nothing else is printed. Raises `KeyboardInterrupt` at a Ctrl-C.
    """
    log, waiting, tell = log or JobLog(queue, job_id), _SchedulerWatch(queue, watch), say or print_line
    with interrupts_noted() as interrupts, ProgressBar() as bar:
        while True:
            job = queue.get(job_id)
            for line in log.read(whole=job.status in TERMINAL):
                tell(line)
            if job.status in TERMINAL:
                break
            if job.progress and say is None:
                bar.show(job.progress)
            if job.status is JobStatus.QUEUED and (news := waiting.look(job.cluster)):
                tell(LogLine(time.time(), "warning", news))
            if interrupts:
                raise KeyboardInterrupt
            time.sleep(POLL_SECONDS)
    return _outcome(job) if say is None else int(job.status is not JobStatus.SUCCEEDED)


class _SchedulerWatch:
    """Whether there is anybody to start a job that waits: what a scheduler that is at work would have recorded."""

    def __init__(self, queue: JobQueue, watch: Callable[[], None] | None) -> None:
        self._queue, self._watch = queue, watch
        self._watched = self._alive = time.monotonic()
        self._told: str | None = None

    def look(self, cluster: str) -> str | None:
        """Return what there is to say that has not been said."""
        now, trouble = time.monotonic(), None
        if self._watch is not None and now - self._watched > WATCH_SECONDS:
            self._watched = now
            try:
                self._watch()
            except JobError as error:  # Ray may be away for a while; the job is safe in the queue
                trouble = f"waits: {error}"
        lease = self._queue.lease(lease_name(cluster))
        if lease is not None and lease.valid:
            self._alive, self._told = now, None
            return None
        if trouble is None and now - self._alive > PATIENCE_SECONDS:
            trouble = f"waits: no scheduler is at work on {cluster}: "
            if self._watch is None:
                trouble += "`python -m jobs submit` with the same job starts one"
            else:
                trouble += "one is being started (if it does not come up, see logs/scheduler.log below LORA_HOME)"
        if trouble is None or trouble == self._told:
            return None
        self._told = trouble
        return trouble


def print_line(line: LogLine) -> None:
    """Print a line of a job's log with its time, for people."""
    print(f"{time.strftime('%H:%M:%S', time.localtime(line.at))} {line.message}", flush=True)


def _outcome(job: Job) -> int:
    if job.status is not JobStatus.SUCCEEDED:
        print(f"{job.id} {job.status}{f': {job.error}' if job.error else ''}", file=sys.stderr)
        return 1
    progress, result = job.progress, job.result
    assert progress is not None and result is not None
    share = progress["trainable_parameters"] / progress["base_parameters"]
    print(
        f"trained {progress['trainable_parameters']:,} parameters,"
        f" {share:.2%} of the base's {progress['base_parameters']:,}"
    )
    print(
        f"loss {progress['first_loss']:.4f} at the first step, {progress['loss']:.4f} at the last"
        f" ({progress['step']} steps)"
    )
    metrics = result["metrics"]
    if "validation_loss" in metrics:
        print(
            f"validation loss {metrics['validation_loss_before']:.4f} before, {metrics['validation_loss']:.4f} after"
            f" step {metrics['validation_step']},"
            f" {accuracy_line(metrics['validation_accuracy'], metrics.get('validation_reward_margin'))}"
        )
    print(f"adapter {result['adapter_bytes'] / 1e6:.1f} MB, base {progress['base_bytes'] / 1e6:.1f} MB")
    print(f'model="{result["model"]}" version {result["version"]}')
    return 0


@contextmanager
def interrupted_later() -> Iterator[None]:
    """Raise a Ctrl-C within it when it ends."""
    pressed: list[int] = []
    with _on_interrupt(lambda number, _: pressed.append(number)):
        yield
    if pressed:
        raise KeyboardInterrupt


@contextmanager
def interrupts_noted() -> Iterator[list[int]]:
    """Note the Ctrl-Cs within it, each of which is raised as usual: Python prints and drops what is raised while a weak
    reference's callback or a finalizer runs, and any allocation may be the one that collects and calls them.
    """
    pressed: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    with _on_interrupt(interrupt):
        yield pressed


@contextmanager
def _on_interrupt(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle Ctrl-C, unless it was ignored: in the background of a script it is meant for others."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
