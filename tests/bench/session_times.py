"""How long sessions take to start, to take a job in, and to let go: `python -m tests.bench.session_times warm,cold`.

Jobs of a tiny random base on an embedded Ray in a LORA_HOME of its own. This process writes their rows, as `submit`.
`warm`: a row is committed while a session of its base has nothing to do, until its first optimizer step has ended.
`cold`: the same without a session, with what the time goes to. `stops`: jobs are cancelled or paused at a random moment
of a random phase, until their workers' CPUs are free, and until no placement group, actor or process of a session is
left; what is left after a minute is an error. `--base` takes another base for `warm` and `cold`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray
from ray.util.state import list_actors

from cluster.embedded_ray import embedded_environment, find_embedded
from cluster.ray_runtime import cluster_name
from cluster.settings import Settings
from jobs.admission import admit
from jobs.errors import IllegalTransitionError
from jobs.job import TERMINAL, Job, JobStatus, RequestedAction, Session
from jobs.scheduling.scheduler import ensure_scheduler
from jobs.spec import JobSpec
from jobs.store.jobs import JobQueue
from jobs.submission import enqueue
from tests.support.machine import clean_environment
from tests.support.tiny_models import save_tiny_model

T = TypeVar("T")

PATIENCE_SECONDS, POLL_SECONDS = 90.0, 0.02
LEFT_AFTER_SECONDS = 60.0
STARTING_SECONDS = 12.0
"""In a session's start a job is stopped so long after it was launched at most."""
PHASES = ("queued", "starting", "loading", "training", "evaluating", "checkpointing", "publishing")
OURS = ("jobs.session", "ray::RayTrainWorker", "ray::TrainController", "ray::Mailbox", "ray::Synchronization",
        "ray::PlacementGroupCleaner", "ray::_Autoscaling")  # fmt: skip
STAGES = (
    "the scheduler's notice",
    "Ray starts the driver",
    "the driver's imports",
    "Train's controller",
    "Ray starts the ranks",
    "the ranks' imports",
    "base and its precision",
    "exactness",
    "data",
    "first step",
)


class Service:
    """A LORA_HOME with its Ray, its queue, and a look at what Ray holds."""

    def __init__(self, idle_seconds: float) -> None:
        os.environ["LORA_SESSION_IDLE_SECONDS"] = str(idle_seconds)
        self.settings = Settings()
        self.home, self.queue = self.settings.home, JobQueue(self.settings.database_url)
        self.cluster = cluster_name(self.settings)
        ensure_scheduler(self.settings, self.queue)
        self.ray = until(lambda: find_embedded(self.settings))
        ray.init(address=self.ray.gcs_address, log_to_driver=False, logging_level="error")

    def submit(self, adapter: str, workers: int, steps: int, **options: Any) -> Job:
        """A job of so many steps on 16 short rows."""
        rows = [{"prompt": f"{adapter:_<9} item {i}: ", "completion": f"code {i * 7 % 13}"} for i in range(16)]
        dataset = self.home / f"{adapter}.jsonl"
        dataset.write_text("\n".join(map(json.dumps, rows)))
        train = {"epochs": max(1, steps // 4), "batch_size": 4, "learning_rate": 1e-3} | options.pop("train", {})
        spec = {"base_model": "base", "dataset": str(dataset), "adapter": adapter, "train": train, "precision": "fp32"}
        parsed = JobSpec.model_validate(spec | {"lora": {"r": 4}, "num_workers": workers} | options)
        admitted = admit(parsed, self.settings, None)
        cluster = {"cluster": self.cluster, "tenant": self.settings.tenant}
        return enqueue(self.queue, self.settings, parsed, admitted, again=True, **cluster)[0]

    def first_step(self, job: Job) -> float:
        """When a job's first optimizer step had ended."""
        return until(lambda: self.queue.step_metrics(job.id))[0].at

    def session(self, job: Job) -> Session:
        session = self.queue.session(str(self.queue.get(job.id).session_id))
        assert session is not None
        return session

    def held(self) -> list[str]:
        """What sessions hold of Ray and of this machine."""
        total, free = ray.cluster_resources()["CPU"], ray.available_resources().get("CPU", 0.0)
        groups = [one for one in ray.util.placement_group_table().values() if one["state"] != "REMOVED"]
        actors = list_actors(self.ray.api_url, filters=[("state", "!=", "DEAD")])
        return [
            *([f"{total - free:g} CPUs"] if free != total else []),
            *(f"placement group {one['placement_group_id'][:8]} {one['state']}" for one in groups),
            *(f"actor {one.class_name} {one.state}" for one in actors),
            *(f"process {process.pid} {process.info['name']}" for process in self.processes()),
        ]

    def processes(self) -> list[psutil.Process]:
        """Those of sessions."""
        found = []
        for process in psutil.process_iter(["pid", "name", "cmdline", "create_time"]):
            command = " ".join(process.info["cmdline"] or [])
            with contextlib.suppress(psutil.Error):  # it may have just ended
                if any(name in command for name in OURS) and process.environ().get("LORA_HOME") == str(self.home):
                    found.append(process)
        return found

    def stop(self) -> None:
        ray.shutdown()
        subprocess.run([sys.executable, "-m", "jobs", "stop"], stdout=subprocess.DEVNULL, check=True)


@contextlib.contextmanager
def running(idle_seconds: float) -> Iterator[Service]:
    """A service whose sessions stay for so long with nothing to do."""
    service = Service(idle_seconds)
    try:
        yield service
    finally:
        service.stop()


def until(look: Callable[[], T | None], patience: float = PATIENCE_SECONDS) -> T:
    """What `look` finds, once it finds something."""
    deadline = time.monotonic() + patience
    while not (found := look()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing after {patience:.0f} s")
        time.sleep(POLL_SECONDS)
    return found


def warm(service: Service, workers: int, number: int, rng: random.Random) -> list[float]:
    """Seconds from each row to its first step, in a session that has nothing else to do."""
    seconds = []
    for index in range(number + 1):
        job = service.submit(f"warm{index}", workers, 4)
        first = service.first_step(job)
        until(lambda job=job: service.queue.get(job.id).status in TERMINAL)  # type: ignore[misc]
        if index:  # the first one starts the session
            seconds.append(first - job.created_at)
        time.sleep(rng.uniform(0.0, 1.0))
    return seconds


def cold(service: Service, workers: int, index: int) -> list[float]:
    """Seconds of each of `STAGES`."""
    until(lambda: not service.held() and not service.queue.sessions())
    job = service.submit(f"cold{index}", workers, 40_000)
    first = service.first_step(job)
    session = service.session(job)
    started: dict[str, list[float]] = {name: [] for name in OURS}
    for process in service.processes():
        name = next(name for name in OURS if name in " ".join(process.info["cmdline"]))
        started[name].append(process.info["create_time"])
    log = service.home / "ray" / "session_latest" / "logs" / f"job-driver-{session.ray_submission_id}.log"
    if not log.exists():
        (log,) = Path("/tmp").glob(f"lora-*/session_latest/logs/{log.name}")
    told = until(lambda: logged(log.read_text()))
    (up,) = (event.at for event in service.queue.events(session.id) if "driver started" in event.message)
    processes = [min(started[name]) for name in ("jobs.session", "ray::RayTrainWorker")]
    ranks = [told[event] for event in ("started", "joined_ranks", "base_loaded", "ready", "joined")]
    marks = [job.created_at, session.created_at, processes[0], up, processes[1], *ranks, first]
    service.queue.request(job.id, RequestedAction.CANCEL)
    return [after - before for before, after in pairwise(marks)]


def logged(text: str) -> dict[str, float]:
    """When rank 0 told of what, once it has told of all."""
    lines = re.findall(r"(\d{4}-\d\d-\d\d [\d:]+,\d+) \S+ lora.\w+ .*rank=0 event=(\w+)", text)
    told = {event: datetime.strptime(at, "%Y-%m-%d %H:%M:%S,%f").timestamp() for at, event in lines}
    return told if "joined" in told else {}


@dataclass
class Stopped:
    """A job that was stopped: seconds until it was, until CPUs were free, and until nothing was left."""

    phase: str
    action: str
    status: str = ""
    job: float = 0.0
    cpus: float = 0.0
    all: float = 0.0
    left: tuple[str, ...] = ()


def stop_one(service: Service, workers: int, index: int, rng: random.Random) -> Stopped:
    """Stop one job in a phase of its life."""
    phase, action = PHASES[index % len(PHASES)], rng.choice([RequestedAction.CANCEL, RequestedAction.PAUSE])
    options: dict[str, Any] = {}
    if phase == "evaluating":
        options = {"validation": 0.5, "train": {"eval_steps": 1}}
    job = service.submit(f"stop{index}", workers, 4 if phase == "publishing" else 40_000, **options)
    wait_for(service, job, phase, rng)
    stopped, asked = Stopped(phase, str(action)), time.monotonic()
    try:
        service.queue.request(job.id, action)
    except IllegalTransitionError:
        stopped.action = "none"  # it had ended by itself
    over = {*TERMINAL, JobStatus.PAUSED}
    stopped.status = str(until(lambda: (now := service.queue.get(job.id).status) in over and now))
    stopped.job = time.monotonic() - asked
    while stopped.all < LEFT_AFTER_SECONDS:
        left, stopped.all = service.held(), time.monotonic() - asked
        sessions = service.queue.sessions()
        if not stopped.cpus and not sessions and not any("CPUs" in one or "group" in one for one in left):
            stopped.cpus = stopped.all
        if not left and not sessions:
            return stopped
        time.sleep(POLL_SECONDS)
    stopped.left = (*left, *(f"{one.id} {one.state}" for one in sessions))
    return stopped


def wait_for(service: Service, job: Job, phase: str, rng: random.Random) -> None:
    """Return at a random moment of a phase."""
    queue, most = service.queue, {"queued": 0.6, "starting": STARTING_SECONDS, "training": 1.0}.get(phase, 0.3)
    if phase != "queued":
        until(queue.sessions)
    if phase == "loading":
        until(lambda: any(one.resolved_precision for one in queue.sessions()))
    elif phase == "evaluating":
        until(lambda: any("validation loss" in event.message for event in queue.events(job.id)))
    elif phase not in ("queued", "starting"):
        service.first_step(job)
    time.sleep(rng.uniform(0.0, most))


def percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "p50": round(statistics.median(ordered), 2),
        "p95": round(ordered[max(0, round(0.95 * len(ordered)) - 1)], 2),
        "most": round(ordered[-1], 2),
        "number": len(ordered),
    }


def measure_warm(arguments: argparse.Namespace, rng: random.Random) -> dict[str, Any]:
    with running(600.0) as service:
        figures = percentiles(warm(service, arguments.workers, arguments.jobs, rng))
    print(f"warm session, row -> first step, s: {figures}", flush=True)
    return figures


def measure_cold(arguments: argparse.Namespace, _: random.Random) -> dict[str, Any]:
    with running(0.0) as service:
        runs = [cold(service, arguments.workers, index) for index in range(arguments.starts)]
    figures: dict[str, Any] = percentiles([sum(stages) for stages in runs])
    stages = zip(STAGES, zip(*runs, strict=True), strict=True)
    figures["stages"] = {name: round(statistics.median(seconds), 2) for name, seconds in stages}
    print(f"cold session, row -> first step, s: { {name: figures[name] for name in ('p50', 'p95', 'number')} }")
    for name, seconds in figures["stages"].items():
        print(f"  {name:<24}{seconds:>6.2f}", flush=True)
    return figures


def measure_stops(arguments: argparse.Namespace, rng: random.Random) -> dict[str, Any]:
    stops = []
    with running(0.0) as service:
        deadline = time.monotonic() + 60 * arguments.minutes
        for index in range(arguments.first, arguments.first + arguments.phases):
            if time.monotonic() > deadline:
                break
            stops.append(one := stop_one(service, arguments.workers, index, rng))
            print(f"{one.phase:<14}{one.action:<8}{one.status:<10}job {one.job:5.2f} s  CPUs {one.cpus:5.2f} s  all"
                  f" {one.all:5.2f} s  {', '.join(one.left)}", flush=True)  # fmt: skip
    figures: dict[str, Any] = {"left": sum(bool(one.left) for one in stops)}
    for phase in (*PHASES, "all"):
        if of := [one for one in stops if phase in (one.phase, "all")]:
            figures[phase] = {
                "cpus": percentiles([one.cpus for one in of]),
                "all": percentiles([one.all for one in of]),
            }
            print(f"{phase:<14} CPUs free, s: {figures[phase]['cpus']}; nothing left: {figures[phase]['all']}")
    return figures


def at_home(base: str) -> int:
    """Run this command in a LORA_HOME of its own and with the token of the Ray there, for which Ray looks when it is
    imported.
    """
    with tempfile.TemporaryDirectory(prefix="lora-times-") as folder:
        home = Path(folder)
        source = str(save_tiny_model("llama", home / "tiny")) if base == "tiny" else base
        environment = {
            **clean_environment(),
            **embedded_environment(Settings(home=home)),
            "LORA_HOME": folder,
            "LORA_BASE_MODELS": json.dumps({"base": source}),
            "LORA_CHECKPOINT_SECONDS": "0.2",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "tests.bench.session_times", *sys.argv[1:], "--home", folder]
        return subprocess.run(command, env=environment, check=False).returncode


def main() -> int:
    """Measure and print; the exit code is 1 where something was left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures = {"warm": measure_warm, "cold": measure_cold, "stops": measure_stops}
    parser.add_argument("parts", help=f"some of {', '.join(measures)}, by commas")
    parser.add_argument("--base", default="tiny", help="a random tiny one, or a hub id, directory or GGUF file")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=20, help="in the warm session")
    parser.add_argument("--starts", type=int, default=3, help="of cold sessions")
    parser.add_argument("--phases", type=int, default=100, help="in which jobs are stopped")
    parser.add_argument("--first", type=int, default=0, help="where in these to begin, to measure in pieces")
    parser.add_argument("--minutes", type=float, default=14.0, help="after which no more are stopped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--home", type=Path, help="a folder to work in, which is made where none is given")
    arguments = parser.parse_args()
    if arguments.home is None:
        return at_home(arguments.base)
    rows: dict[str, Any] = {"bench": "session_times", "base": arguments.base, "workers": arguments.workers}
    for part in arguments.parts.split(","):
        rows[part] = measures[part](arguments, random.Random(f"{arguments.seed} {arguments.first}"))
    print("\n" + json.dumps(rows))
    return int(bool(rows.get("stops", {}).get("left")))


if __name__ == "__main__":
    raise SystemExit(main())
