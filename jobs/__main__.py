"""The command line: `python -m jobs submit | list | show | logs | cancel | pause | resume | top | adapters | ...`.

`submit` checks a job, writes a row and follows it. It may be stopped at any moment: the scheduler is a process of
its own.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from cluster.adapter_lifecycle import AdapterConflict
from cluster.embedded_ray import embedded_environment, stop_embedded, stop_recorded
from cluster.proxies import reach_this_machine_directly
from cluster.ray_runtime import cluster_name, log_to_stderr, on_a_cluster, use_own_ray
from cluster.registry import AdapterNotFound
from cluster.settings import Settings, SettingsError, load_settings
from cluster.storage.base import StorageError
from jobs.adapter_commands import add_adapter_commands
from jobs.admitted import Admitted
from jobs.errors import DatabaseUnavailableError, JobError
from jobs.estimate import Estimate, estimate, memory_of_a_rank
from jobs.follow import follow, interrupted_later
from jobs.job_commands import add_job_commands
from jobs.job_report import job_document
from jobs.screen import print_json
from jobs.spec import SpecError, load_spec
from jobs.store.database import check_database
from jobs.store.jobs import JobQueue
from jobs.submission import enqueue


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
    until = submit.add_mutually_exclusive_group()
    until.add_argument("--follow", action="store_true", help="until it has ended, which it does if nothing is said")
    until.add_argument("--detach", action="store_true", help="return as soon as the job is queued")
    until.add_argument("--dry-run", action="store_true", help="say what the job comes to, and queue nothing")
    json_help = "print the job, or what it comes to, as JSON; with --detach or --dry-run nothing else is printed"
    submit.add_argument("--json", action="store_true", help=json_help)
    depends_help = "wait until this job has succeeded, too; several times for several"
    submit.add_argument("--depends-on", action="append", default=[], metavar="JOB", help=depends_help)
    submit.add_argument("--again", action="store_true", help="train it again, although the same job is there already")
    submit.set_defaults(command=_submit)

    add_job_commands(commands)
    add_adapter_commands(commands)
    commands.add_parser("scheduler", help="schedule this cluster's jobs").set_defaults(command=_scheduler)
    commands.add_parser("stop", help="end what was started on this machine").set_defaults(command=_stop)
    return parser


def _submit(settings: Settings, arguments: argparse.Namespace) -> int:
    spec = load_spec(arguments.spec)
    queue = JobQueue(settings.database_url)
    more = [queue.get(job).id for job in arguments.depends_on]
    needed = list(dict.fromkeys([*spec.depends_on, *more]))
    spec = spec.model_copy(update={"base_model": settings.locate_base(spec.base_model), "depends_on": needed})
    # Late: these import torch and Ray, which `list` and `show` can do without.
    from jobs.admission import admit
    from jobs.scheduling.scheduler import ensure_scheduler

    if not on_a_cluster() and not arguments.dry_run:
        ensure_scheduler(settings, queue)  # Ray comes up while the job is checked; with nothing to do it ends by itself
    workers, on_gpus = _room(settings)
    admitted = admit(spec, settings, workers, queue.dependency_problems(settings.tenant, spec.depends_on))
    if arguments.dry_run:
        memory = memory_of_a_rank(spec, settings, admitted, "cuda" if on_gpus else "cpu")
        return _tell_estimate(estimate(queue, cluster_name(settings), spec, admitted, memory), admitted, arguments.json)
    quiet = arguments.json
    for line in () if quiet else admitted.summary:
        print(f"  {line}")
    try:
        # Pressed between the row and its scheduler, Ctrl-C would leave a job that "goes on without you" to nobody.
        with interrupted_later():
            again, cluster = arguments.again, cluster_name(settings)
            try:
                job, new = enqueue(
                    queue, settings, spec, admitted, cluster=cluster, tenant=settings.tenant, again=again
                )
            except (StorageError, DatabaseUnavailableError):
                ensure_scheduler(settings, queue)  # the job may be in the queue all the same
                raise
            if quiet:
                print_json(job_document(job))
            else:
                state = "queued" if new else f"is there already, {job.status}"
                print(f"{job.id} {state}: {job.base}:{spec.adapter}")
                verbs = f"follow it: python -m jobs logs -f {job.id}      cancel it: python -m jobs cancel {job.id}"
                print(f"  {verbs}", flush=True)
            ensure_scheduler(settings, queue)
        if arguments.detach:
            return 0
        return follow(queue, job.id, lambda: ensure_scheduler(settings, queue))
    except KeyboardInterrupt:
        print(f"\n{job.id} goes on without you: python -m jobs logs -f {job.id}", file=sys.stderr)
        return 130


def _room(settings: Settings) -> tuple[int, bool]:
    """Return how many ranks there may be at once, and whether they have GPUs."""
    if on_a_cluster():
        from jobs.scheduling.launcher import Launcher

        size = Launcher(settings.driver_labels).size()
        check_database(settings.database_url, size.nodes)
        on_gpus = size.on_gpus or "gpus_per_rank" in settings.model_fields_set
        return max(size.workers, settings.max_workers or 0), on_gpus
    import torch

    gpus = torch.cuda.device_count()
    return gpus or len(os.sched_getaffinity(0)), gpus > 0


def _tell_estimate(found: Estimate, admitted: Admitted, as_json: bool) -> int:
    if as_json:
        print_json(asdict(found) | {"summary": admitted.summary})
    else:
        print("\n".join(f"  {line}" for line in (*admitted.summary, *found.lines())))
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


if __name__ == "__main__":
    raise SystemExit(main())
