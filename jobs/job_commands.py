"""`python -m jobs list | show | logs | cancel | pause | resume | top`: jobs that are there, for people and as JSON."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

from cluster.ray_runtime import cluster_name, on_a_cluster
from cluster.settings import Settings
from cluster.storage.directory import open_storage
from jobs.follow import follow, print_line
from jobs.job import TERMINAL, Job, JobStatus, RequestedAction
from jobs.job_log import JobLog, LogLine
from jobs.job_report import job_document, report
from jobs.screen import Table, print_json, refresh, show, sparkline
from jobs.store.jobs import JobQueue
from jobs.sweep import value_text
from jobs.trials import Trial

LISTED = 20
TOP_SECONDS = 2.0

Command = Callable[[Settings, argparse.Namespace], int]


def add_job_commands(commands: Any) -> None:
    """Add what can be done with jobs that are there to a parser's commands."""

    def command(name: str, run: Command, text: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(name, help=text)
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(command=run)
        return parser

    listed = command("list", _list, "jobs, the newest first")
    listed.add_argument("--limit", type=int, default=LISTED, help=f"how many at most ({LISTED})")
    statuses = [str(status) for status in JobStatus]
    listed.add_argument("--status", action="append", choices=statuses, help="only jobs in this state; several may do")
    listed.add_argument("--tenant", help="only jobs of this tenant")
    listed.add_argument(
        "--tag", action="append", default=[], metavar="KEY=VALUE", type=_tag, help="only jobs with this in metadata"
    )
    listed.add_argument("--trials", action="store_true", help="also the trials of sweeps")
    for name, run, text in (
        ("show", _show, "how far a job is, what came of it, what was asked for, and its history"),
        ("logs", _logs, "what has happened to a job"),
        ("cancel", _cancel, "cancel a job: at once if it waits, after its current step if it runs"),
        ("pause", _pause, "let a job wait: at once, or after its current step, from where it then goes on"),
        ("resume", _resume, "put a paused job back into the queue"),
    ):
        one = command(name, run, text)
        one.add_argument("job", help="a job's id, or the beginning of it")
        if name == "logs":
            follow_text = "go on until the job ends; exit 0 only if it succeeded"
            one.add_argument("-f", "--follow", action="store_true", help=follow_text)
    command("top", _top, "this cluster's sessions, what they train and how fast, and its queue; until Ctrl-C")


def _print_json_line(line: LogLine) -> None:
    print(line.to_json(), flush=True)


def _tag(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"write KEY=VALUE, not {text}")
    return key, value


def _list(settings: Settings, arguments: argparse.Namespace) -> int:
    statuses = [JobStatus(status) for status in arguments.status] if arguments.status else None
    tags = dict(arguments.tag) or None
    queue = JobQueue(settings.database_url)
    limit, trials = max(1, arguments.limit), arguments.trials
    found, more = queue.page(arguments.tenant, limit, metadata=tags, statuses=statuses, trials=trials)
    if arguments.json:
        print_json([job_document(job) for job in found])
        return 0
    show((("job", "state", "step", "loss", "adapter", "tags"), [_row(job) for job in found]))
    if more:
        print(f"older ones are left out: --limit {2 * arguments.limit} shows more")
    return 0


def _row(job: Job) -> list[str]:
    step, loss = "-", "-"
    if job.progress:
        step, loss = f"{job.progress['step']}/{job.progress['steps']}", f"{job.progress['loss']:.4f}"
    tags = ", ".join(f"{key}={value}" for key, value in (job.metadata or {}).items())
    return [job.id, job.status, step, loss, f"{job.base}:{job.adapter}", tags]


def _show(settings: Settings, arguments: argparse.Namespace) -> int:
    queue = JobQueue(settings.database_url)
    job = queue.get(arguments.job)
    session = queue.session(job.session_id) if job.session_id else None
    events, steps = queue.events(job.id), queue.step_metrics(job.id)
    trials = queue.trials([job.id]).get(job.id, [])
    if arguments.json:
        print_json(job_document(job, session, events, steps, trials))
        return 0
    curve = sparkline([one.figures["train_loss"] for one in steps if "train_loss" in one.figures])
    for line in report(job, session, events, settings, curve):
        print(line)
    if trials:
        show((("trial", *trials[0].parameters, "state", "step", "validation loss", ""), [*map(_trial_row, trials)]))
    return 0


def _trial_row(trial: Trial) -> list[str]:
    step, loss = f"0/{trial.steps}", "-"
    if trial.progress:
        step = f"{trial.progress['step']}/{trial.steps}"
    if (last := trial.validation_loss) is not None:
        loss = f"{last:.4f}"
    values = map(value_text, trial.parameters.values())
    return [trial.job_id, *values, trial.status, step, loss, trial.standing]


def _logs(settings: Settings, arguments: argparse.Namespace) -> int:
    queue = JobQueue(settings.database_url)
    job_id = queue.get(arguments.job).id
    log = JobLog(queue, job_id, open_storage(settings.storage_url))
    if not arguments.follow:
        for line in log.read(whole=True):
            (_print_json_line if arguments.json else print_line)(line)
        return 0
    try:
        return follow(queue, job_id, log=log, say=_print_json_line if arguments.json else None)
    except KeyboardInterrupt:
        return 130


def _cancel(settings: Settings, arguments: argparse.Namespace) -> int:
    queue = JobQueue(settings.database_url)
    job = queue.request(queue.get(arguments.job).id, RequestedAction.CANCEL)
    return _tell(job, job.status if job.status in TERMINAL else "is asked to stop after its current step", arguments)


def _pause(settings: Settings, arguments: argparse.Namespace) -> int:
    queue = JobQueue(settings.database_url)
    job = queue.request(queue.get(arguments.job).id, RequestedAction.PAUSE)
    paused = job.status is JobStatus.PAUSED
    return _tell(job, job.status if paused else "is asked to pause after its current step", arguments)


def _resume(settings: Settings, arguments: argparse.Namespace) -> int:
    from jobs.scheduling.scheduler import ensure_scheduler

    queue = JobQueue(settings.database_url)
    job = queue.resume(queue.get(arguments.job).id)
    ensure_scheduler(settings, queue)
    return _tell(job, job.status, arguments)


def _tell(job: Job, text: str, arguments: argparse.Namespace) -> int:
    if arguments.json:
        print_json(job_document(job))
    else:
        print(f"{job.id} {text}")
    return 0


def _top(settings: Settings, arguments: argparse.Namespace) -> int:
    queue, cluster = JobQueue(settings.database_url), cluster_name(settings)
    workers = _workers(settings)
    if arguments.json:
        print_json(_at_work(queue, cluster, workers))
    else:
        refresh(lambda: _tables(_at_work(queue, cluster, workers)), TOP_SECONDS)
    return 0


def _workers(settings: Settings) -> int | None:
    """Return how many ranks the cluster's nodes hold; None for a laptop, or where Ray does not answer."""
    if not on_a_cluster():
        return None
    from jobs.scheduling.launcher import Launcher, RayUnreachableError

    try:
        return Launcher(settings.driver_labels).size().workers
    except RayUnreachableError:
        return None


def _at_work(queue: JobQueue, cluster: str, workers: int | None) -> dict[str, Any]:
    """Return what is going on in a cluster, as `top --json` prints it."""
    running = queue.list(cluster, {JobStatus.RUNNING})
    sessions = [
        {
            "id": session.id,
            "state": str(session.state),
            "base_model": session.base_model,
            "precision": session.resolved_precision or session.precision,
            "num_workers": session.num_workers,
            "tokens_per_second": session.tokens_per_second,
            "seconds": time.time() - session.created_at,
            "jobs": [job_document(job) for job in running if job.session_id == session.id],
        }
        for session in queue.sessions(cluster)
    ]
    return {
        "cluster": cluster,
        "workers": {"used": sum(int(str(one["num_workers"])) for one in sessions), "all": workers},
        "counts": {str(status): number for status, number in queue.counts(cluster).items()},
        "sessions": sessions,
    }


def _tables(found: dict[str, Any]) -> Sequence[Table]:
    workers = found["workers"]
    used = f"{workers['used']}" if workers["all"] is None else f"{workers['used']} of {workers['all']}"
    counts = ", ".join(f"{number} {status}" for status, number in found["counts"].items() if number) or "none yet"
    rates = sum(one["tokens_per_second"] or 0.0 for one in found["sessions"] if one["jobs"])
    head = (("cluster", "workers", "tokens/s", "jobs"), [[found["cluster"], used, f"{rates:,.0f}", counts]])
    sessions = [
        [
            one["id"], one["state"], f"{one['base_model']} {one['precision']}", str(one["num_workers"]),
            str(len(one["jobs"])), f"{one['tokens_per_second']:,.0f}" if one["tokens_per_second"] else "-",
        ]
        for one in found["sessions"]
    ]  # fmt: skip
    jobs = [
        [job["id"], job["model"], f"{job['progress']['step']}/{job['progress']['steps']}" if job["progress"] else "-",
         f"{job['progress']['loss']:.4f}" if job["progress"] and job["progress"]["loss"] is not None else "-"]
        for one in found["sessions"] for job in one["jobs"]
    ]  # fmt: skip
    return [
        head,
        (("session", "state", "base", "workers", "jobs", "tokens/s"), sessions),
        (("job", "adapter", "step", "loss"), jobs),
    ]
