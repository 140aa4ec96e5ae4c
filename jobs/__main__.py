"""The command line: `python -m jobs submit | list | show | logs | cancel | pause | resume | top | adapters | ...`.

`submit` checks a job, writes a row and follows it. It may be stopped at any moment: the scheduler is a process of
its own.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from cluster.adapter_lifecycle import AdapterConflict
from cluster.embedded_ray import embedded_environment, stop_embedded, stop_recorded
from cluster.proxies import reach_this_machine_directly
from cluster.ray_runtime import cluster_name, log_to_stderr, on_a_cluster, use_own_ray
from cluster.registry import AdapterNotFound
from cluster.settings import Settings, SettingsError, load_settings
from cluster.storage.base import StorageError
from jobs.adapter_commands import add_adapter_commands
from jobs.follow import follow, interrupted_later
from jobs.job import JobError
from jobs.job_commands import add_job_commands, print_json
from jobs.job_report import job_document
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
    submit.add_argument("--json", action="store_true", help="print the job as JSON, and nothing else; with --detach")
    submit.add_argument("--again", action="store_true", help="train it again, although the same job is there already")
    submit.set_defaults(command=_submit)

    add_job_commands(commands)
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
    quiet = arguments.json
    for line in () if quiet else admitted.summary:
        print(f"  {line}")
    try:
        # Pressed between the row and its scheduler, Ctrl-C would leave a job that "goes on without you" to nobody.
        with interrupted_later():
            again, cluster = arguments.again, cluster_name(settings)
            job, new = enqueue(queue, settings, spec, admitted, cluster=cluster, tenant=settings.tenant, again=again)
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
