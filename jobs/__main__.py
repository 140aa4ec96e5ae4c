"""The command line: `python -m jobs submit | list | show | logs | cancel | pause | resume | adapters | ...`.

`submit` checks a job, writes a row and follows it. It may be stopped at any moment: the scheduler is a process of
its own.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cluster.adapter_lifecycle import AdapterConflict
from cluster.embedded_ray import embedded_environment, stop_embedded, stop_recorded
from cluster.proxies import reach_this_machine_directly
from cluster.ray_runtime import cluster_name, log_to_stderr, on_a_cluster, use_own_ray
from cluster.registry import AdapterNotFound
from cluster.settings import Settings, SettingsError, load_settings
from cluster.storage.base import StorageError
from jobs.adapter_commands import add_adapter_commands
from jobs.job import TERMINAL, Job, JobError, JobStatus, RequestedAction, lease_name
from jobs.job_report import accuracy_line, progress_line, report
from jobs.spec import SpecError, load_spec
from jobs.store.database import check_database
from jobs.store.jobs import JobQueue
from jobs.submission import enqueue

POLL_SECONDS = 0.5
WATCH_SECONDS = 10.0
PATIENCE_SECONDS = 3.0  # without a scheduler, before that is said: one that starts takes longer than to say so
CLEAR = "\x1b[2K\r"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake is printed in words, without a traceback."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    reach_this_machine_directly()
    use_own_ray()
    for bars in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):  # transformers', between our own lines
        os.environ.setdefault(bars, "1")
    try:
        command: Callable[[Settings, argparse.Namespace], int] = chosen.command
        settings = load_settings()
        log_to_stderr(settings.log_format)
        return command(settings, chosen)
    except (SpecError, SettingsError, JobError, StorageError, AdapterNotFound, AdapterConflict) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs", description="LoRA fine-tuning jobs on a shared frozen base."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    submit = commands.add_parser("submit", help="check a job, queue it and follow it; exit 0 only if it succeeds")
    submit.add_argument("spec", type=Path, help="YAML or JSON, see jobs/examples/")
    submit.add_argument("--no-follow", action="store_true", help="return as soon as the job is queued")
    submit.add_argument("--again", action="store_true", help="train it again, although the same job is there already")
    submit.set_defaults(command=_submit)

    commands.add_parser("list", help="all jobs, oldest first").set_defaults(command=_list)
    for name, command, text in (
        ("show", _show, "how far a job is, what came of it, what was asked for, and its history"),
        ("logs", _logs, "follow a job to its end; exit 0 only if it succeeds"),
        ("cancel", _cancel, "cancel a job: at once if it waits, after its current step if it runs"),
        ("pause", _pause, "let a job wait: at once, or after its current step, from where it then goes on"),
        ("resume", _resume, "put a paused job back into the queue"),
    ):
        one = commands.add_parser(name, help=text)
        one.add_argument("job", help="a job's id, or the beginning of it")
        one.set_defaults(command=command)
    add_adapter_commands(commands)
    commands.add_parser("scheduler", help="schedule this cluster's jobs").set_defaults(command=_scheduler)
    commands.add_parser("stop", help="end what was started on this machine").set_defaults(command=_stop)
    return parser


def _submit(settings: Settings, arguments: argparse.Namespace) -> int:
    spec = load_spec(arguments.spec)
    spec = spec.model_copy(update={"base_model": settings.locate_base(spec.base_model)})
    # Late: these import torch and Ray, which `list` and `show` can do without.
    from jobs.admission import admit
    from jobs.scheduling.launcher import Launcher
    from jobs.scheduling.scheduler import ensure_scheduler

    queue = JobQueue(settings.database_url)
    if on_a_cluster():
        size = Launcher(settings.driver_labels).size()
        check_database(settings.database_url, size.nodes)
        workers = max(size.workers, settings.max_workers or 0)
    else:
        ensure_scheduler(settings, queue)  # Ray comes up while the job is checked; with nothing to do it ends by itself
        import torch

        workers = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    admitted = admit(spec, settings, workers)
    for line in admitted.summary:
        print(f"  {line}")
    try:
        # Pressed between the row and its scheduler, Ctrl-C would leave a job that "goes on without you" to nobody.
        with _interrupted_later():
            again, cluster = arguments.again, cluster_name(settings)
            job, new = enqueue(queue, settings, spec, admitted, cluster=cluster, tenant=settings.tenant, again=again)
            print(f"{job.id} {'queued' if new else f'is there already, {job.status}'}: {job.base}:{spec.adapter}")
            print(
                f"  follow it: python -m jobs logs {job.id}      cancel it: python -m jobs cancel {job.id}", flush=True
            )
            ensure_scheduler(settings, queue)
        if arguments.no_follow:
            return 0
        return follow(queue, job.id, lambda: ensure_scheduler(settings, queue))
    except KeyboardInterrupt:
        print(f"\n{job.id} goes on without you: python -m jobs logs {job.id}", file=sys.stderr)
        return 130


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Raise a Ctrl-C within it when it ends."""
    pressed: list[int] = []
    with _on_interrupt(lambda number, _: pressed.append(number)):
        yield
    if pressed:
        raise KeyboardInterrupt


@contextmanager
def _interrupts_noted() -> Iterator[list[int]]:
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


def _list(settings: Settings, _: argparse.Namespace) -> int:
    for job in JobQueue(settings.database_url).list():
        steps = f"{job.progress['step']}/{job.progress['steps']}" if job.progress else "-"
        print(f"{job.id}  {job.status:<10} {steps:>9}  {job.base}:{job.spec.adapter}")
    return 0


def _show(settings: Settings, arguments: argparse.Namespace) -> int:
    queue = JobQueue(settings.database_url)
    job = queue.get(arguments.job)
    session = queue.session(job.session_id) if job.session_id else None
    for line in report(job, session, queue.events(job.id), settings):
        print(line)
    return 0


def _logs(settings: Settings, arguments: argparse.Namespace) -> int:
    queue = JobQueue(settings.database_url)
    try:
        return follow(queue, queue.get(arguments.job).id)
    except KeyboardInterrupt:
        return 130


def _cancel(settings: Settings, arguments: argparse.Namespace) -> int:
    queue = JobQueue(settings.database_url)
    job = queue.request(queue.get(arguments.job).id, RequestedAction.CANCEL)
    print(f"{job.id} {job.status if job.status in TERMINAL else 'is asked to stop after its current step'}")
    return 0


def _pause(settings: Settings, arguments: argparse.Namespace) -> int:
    queue = JobQueue(settings.database_url)
    job = queue.request(queue.get(arguments.job).id, RequestedAction.PAUSE)
    print(f"{job.id} {job.status if job.status is JobStatus.PAUSED else 'is asked to pause after its current step'}")
    return 0


def _resume(settings: Settings, arguments: argparse.Namespace) -> int:
    from jobs.scheduling.scheduler import ensure_scheduler

    queue = JobQueue(settings.database_url)
    job = queue.resume(queue.get(arguments.job).id)
    ensure_scheduler(settings, queue)
    print(f"{job.id} {job.status}")
    return 0


def _scheduler(settings: Settings, _: argparse.Namespace) -> int:
    if not on_a_cluster():
        os.environ.update(embedded_environment(settings))
    from jobs.scheduling.scheduler import run_scheduler

    run_scheduler(settings)
    return 0


def _stop(settings: Settings, _: argparse.Namespace) -> int:
    ended = [*stop_recorded(settings), *stop_embedded(settings)]
    print("\n".join(f"stopped {what}" for what in ended) or "nothing was running")
    return 0


def follow(queue: JobQueue, job_id: str, watch: Callable[[], None] | None = None) -> int:
    """Print a job's events and progress until it ends; 0 only if it succeeded. `watch`, which sees to it that there is
    a scheduler, is called now and then while it waits. Raises `KeyboardInterrupt` at a Ctrl-C."""
    seen, shown = 0, 0.0
    live = sys.stderr.isatty()
    waiting = _SchedulerWatch(queue, watch)
    with _interrupts_noted() as interrupts:
        while True:
            job = queue.get(job_id)
            for event in queue.events(job_id, after=seen):
                seen = event.id
                _say(event.at, event.message, live)
            if job.status in TERMINAL:
                return _outcome(job)
            if job.progress and (live or time.monotonic() - shown > 5):
                shown = time.monotonic()
                print(
                    f"{CLEAR if live else ''}{progress_line(job.progress)}",
                    end="" if live else "\n",
                    file=sys.stderr,
                    flush=True,
                )
            if job.status is JobStatus.QUEUED and (news := waiting.look(job.cluster)):
                _say(time.time(), news, live)
            if interrupts:
                raise KeyboardInterrupt
            time.sleep(POLL_SECONDS)


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


def _say(at: float, message: str, live: bool) -> None:
    print(f"{CLEAR if live else ''}{time.strftime('%H:%M:%S', time.localtime(at))} {message}", flush=True)


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


if __name__ == "__main__":
    raise SystemExit(main())
