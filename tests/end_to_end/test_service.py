"""The whole path on a real Ray, with a small random model: submit, queue, two ranks, kill, resume, publish.

One embedded Ray serves all tests of this file, as a laptop has it, beside what looks like another one; a job's
published version is the digest of its adapter, so "the same adapter" is "the same version".
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests

from cluster import metrics
from cluster.embedded_ray import find_embedded
from cluster.ray_runtime import cluster_name
from cluster.settings import Settings, load_settings
from cluster.storage.directory import open_storage
from cluster.storage.keys import checkpoints_prefix, examples_key, job_logs_prefix
from jobs.__main__ import main
from jobs.admission import admit
from jobs.demo import served
from jobs.job import Job, JobStatus, RequestedAction
from jobs.spec import load_spec
from jobs.store.jobs import JobQueue
from jobs.submission import enqueue
from tests.k8s.objects import render
from tests.k8s.queries import NODE_METRICS, labels_read, panels, queries
from tests.support.another_ray import another_ray
from tests.support.machine import clean_environment, free_port
from tests.support.prometheus_server import running_prometheus
from tests.support.tiny_models import save_tiny_model

pytestmark = pytest.mark.alone

WAIT = 240.0


class Laptop:
    """A LORA_HOME of its own, the commands in it, and its queue."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.metrics_port = free_port()
        self.environment = {
            **clean_environment(),
            "LORA_HOME": str(home),
            "LORA_BASE_MODELS": json.dumps({"tiny": str(save_tiny_model("llama", home / "tiny"))}),
            "LORA_CHECKPOINT_SECONDS": "0.5",
            "LORA_METRICS_PORT": str(self.metrics_port),
            "HF_HUB_OFFLINE": "1",
        }
        self.settings = Settings(home=home, serve_port=free_port())
        self.queue = JobQueue(self.settings.database_url)

    def spec(self, name: str, *, steps: int = 20, rows: int = 16, **options: object) -> Path:
        """A job of `steps` optimizer steps on `rows` short rows, which are as long in all jobs: what memory longer ones
        take is found out in seconds.
        """
        dataset = self.home / f"{name}.jsonl"
        dataset.write_text(
            "\n".join(
                json.dumps({"prompt": f"{name:_<11} item {i}: ", "completion": f"code {i * 7 % 13}"})
                for i in range(rows)
            )
        )
        batch = 4
        spec = {
            "base_model": "tiny",
            "dataset": str(dataset),
            "adapter": name,
            "lora": {"r": 4, "lora_dropout": 0.1},
            "train": {"epochs": steps * batch // rows, "batch_size": batch, "learning_rate": 0.01},
            "precision": "fp32",
            "num_workers": 2,
            **options,
        }
        path = self.home / f"{name}.json"
        path.write_text(json.dumps(spec))
        return path

    def jobs(self, *arguments: str, timeout: float = WAIT) -> subprocess.CompletedProcess[str]:
        """`python -m jobs ...`."""
        return subprocess.run(
            [sys.executable, "-m", "jobs", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def submit(self, spec: Path, *options: str) -> str:
        """Submit without following; returns the job's id. The command runs in this process, which has imported torch
        already: by itself it takes ten seconds.
        """
        output = io.StringIO()
        with self.here() as patched, contextlib.redirect_stdout(output):
            patched.setattr("jobs.__main__.log_to_stderr", lambda _: None)
            assert main(["submit", str(spec), "--detach", *options]) == 0, output.getvalue()
        return next(word for word in output.getvalue().split() if word.startswith("job-"))

    def submit_for(self, tenants: str, spec: Path) -> list[str]:
        """Submit five jobs of each tenant, all of one before the next one's."""
        with self.here():
            settings, one = load_settings(), load_spec(spec)
            admitted = admit(one, settings, None)
            specs = [one.model_copy(update={"adapter": f"{one.adapter}{number}"}) for number in range(5)]
            where = {"cluster": cluster_name(settings)}
            return [
                enqueue(self.queue, settings, each, admitted, tenant=tenant, **where)[0].id
                for tenant in tenants
                for each in specs
            ]

    @contextlib.contextmanager
    def here(self) -> Iterator[pytest.MonkeyPatch]:
        """This process has the environment of the commands."""
        with pytest.MonkeyPatch.context() as patched:
            for name in set(os.environ) - set(self.environment):
                patched.delenv(name)
            for name, value in self.environment.items():
                patched.setenv(name, value)
            yield patched

    def wait(self, job_id: str, until: Callable[[Job], bool]) -> Job:
        """The job, once `until` holds."""
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline:
            job = self.queue.get(job_id)
            if until(job):
                return job
            time.sleep(0.05)
        raise AssertionError(f"{job} after {WAIT} s: {[event.message for event in self.queue.events(job_id)]}")

    def finished(self, job_id: str) -> Job:
        return self.wait(job_id, lambda job: job.finished_at is not None)

    def started(self, job_id: str) -> int:
        """The event with which a job's last attempt began."""
        return max(event.id for event in self.queue.events(job_id) if (event.data or {}).get("to") == "running")

    def ranks(self) -> list[psutil.Process]:
        """The processes of the worker group."""
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if any("RayTrainWorker" in part for part in process.info["cmdline"] or [])
            and process.environ().get("LORA_HOME") == str(self.home)
        ]


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    laptop = Laptop(tmp_path_factory.mktemp("home"))
    with another_ray(tmp_path_factory.mktemp("other")):
        yield laptop
        laptop.jobs("stop")


def version_of(job: Job) -> str:
    assert job.status is JobStatus.SUCCEEDED, job.error
    assert job.result is not None
    return str(job.result["version"])


def test_submit_follows_a_job_and_exits_zero_when_it_succeeded(laptop: Laptop) -> None:
    done = laptop.jobs("submit", str(laptop.spec("first")))
    assert done.returncode == 0, done.stderr + done.stdout
    assert 'model="tiny:first"' in done.stdout
    assert "python -m jobs cancel job-" in done.stdout
    assert (laptop.home / "storage").is_dir()
    # Of all steps there are metrics, and in storage a log, also of what is no event of its history.
    (job,) = laptop.queue.list()
    assert [one.step for one in laptop.queue.step_metrics(job.id)] == [*range(1, 21)]
    storage = open_storage(laptop.settings.storage_url)
    told = [json.loads(line) for key in storage.list(job_logs_prefix(job.id)) for line in storage.get(key).splitlines()]
    messages = "\n".join(line["message"] for line in told)
    for part in ("16 rows of prompt/completion", "computes in fp32", "published tiny:first version"):
        assert part in messages, messages


def test_a_job_goes_on_from_a_published_adapter(laptop: Laptop) -> None:
    """Its first loss is about where the first one ended; other ranks than its start's are refused at submission."""
    lora = {"r": 4, "rank_pattern": {"q_proj": 2}}
    first = laptop.finished(laptop.submit(laptop.spec("start", lora=lora)))
    version = version_of(first)
    rows = str(laptop.home / "start.jsonl")
    job_id = laptop.submit(laptop.spec("more", lora=lora, init_adapter=f"tiny:start@{version}", dataset=rows))
    second = laptop.finished(job_id)
    assert version_of(second) != version
    assert first.progress is not None and second.progress is not None
    assert second.progress["first_loss"] < 0.5 * first.progress["first_loss"]
    wrong = laptop.jobs("submit", str(laptop.spec("wrong", lora={"r": 8}, init_adapter="tiny:start")))
    assert wrong.returncode != 0
    assert "init_adapter: its rank is 2 in model.layers.0.self_attn.q_proj" in wrong.stderr


def test_the_same_job_is_found_and_not_trained_again(laptop: Laptop) -> None:
    first = laptop.submit(laptop.spec("twice"))
    assert laptop.submit(laptop.spec("twice")) == first
    again = laptop.submit(laptop.spec("twice"), "--again")
    assert again != first
    assert version_of(laptop.finished(first)) == version_of(laptop.finished(again))


def test_jobs_train_together_and_a_killed_rank_changes_no_bit_of_what_each_is_alone(laptop: Laptop) -> None:
    """Two ranks and three jobs on one base: one of them joins late, and one leaves before the others are done."""
    lora = {"r": 3, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}
    specs = [laptop.spec("killed", steps=200), laptop.spec("beside", steps=120, lora=lora), laptop.spec("short")]
    alone = [laptop.finished(laptop.submit(spec)) for spec in specs]
    first = laptop.submit(specs[0], "--again")
    laptop.wait(first, lambda job: bool(job.progress and job.progress["step"] >= 10))
    ids = [first, *(laptop.submit(spec, "--again") for spec in specs[1:])]
    laptop.wait(ids[1], lambda job: bool(job.progress and job.progress["step"] >= 30))
    victims = laptop.ranks()
    assert len(victims) == 2
    victims[1].kill()
    assert all(laptop.queue.get(job_id).status is JobStatus.RUNNING for job_id in ids[:2])
    together = [laptop.finished(job_id) for job_id in ids]
    assert [version_of(job) for job in together] == [version_of(job) for job in alone]
    assert len({job.session_id for job in together}) == 1
    assert together[1].started_at is not None and together[0].finished_at is not None
    assert together[1].started_at < together[0].finished_at
    assert [job.progress and job.progress["step"] for job in together] == [200, 120, 20]
    assert victims[1].pid not in {rank.pid for rank in laptop.ranks()}
    assert all(any("rank was lost" in event.message for event in laptop.queue.events(job_id)) for job_id in ids[:2])
    storage = open_storage(laptop.settings.storage_url)
    for job_id in ids:  # what it was to be continued from is gone
        prefix = checkpoints_prefix(job_id)
        laptop.wait(job_id, lambda _, prefix=prefix: not storage.list(prefix))  # type: ignore[misc]


def test_two_tenants_share_the_sessions_of_two_bases_for_which_a_weaker_job_makes_way(laptop: Laptop) -> None:
    """Ten jobs of each base, those of one base before the others. What trains meanwhile goes on from where it was."""
    spec = laptop.spec("weaker", steps=400, priority=-1)
    undisturbed = laptop.finished(laptop.submit(spec))
    weaker = laptop.submit(spec, "--again")
    laptop.wait(weaker, lambda job: bool(job.progress and job.progress["step"] >= 20))
    other = str(save_tiny_model("llama", laptop.home / "other", seed=1))
    first = laptop.submit_for("ab", laptop.spec("first", base_model=other, priority=1))
    laptop.wait(weaker, lambda job: job.status is JobStatus.QUEUED)
    made_way = time.time()
    second = laptop.submit_for("ab", laptop.spec("second"))
    for ids in (first, second):
        jobs = [laptop.finished(job_id) for job_id in ids]
        assert all(version_of(job) for job in jobs)
        assert len({job.session_id for job in jobs}) == 1
        jobs.sort(key=lambda job: laptop.started(job.id))
        turns = list(itertools.accumulate(1 if job.tenant == "a" else -1 for job in jobs))
        assert max(map(abs, turns)) == 1, [job.tenant for job in jobs]
    job = laptop.finished(weaker)
    assert version_of(job) == version_of(undisturbed)
    assert job.attempt == 2 and job.lost_attempts == 0
    assert laptop.started(weaker) > max(map(laptop.started, first))
    steps = laptop.queue.step_metrics(weaker)
    assert [one.step for one in steps] == [*range(1, 401)]
    assert steps[19].at < made_way < steps[-1].at  # none was made twice


def test_early_stopping_ends_a_job_with_its_reason_and_publishes_its_best(laptop: Laptop) -> None:
    train = {"epochs": 400, "batch_size": 4, "learning_rate": 0.02, "eval_steps": 10, "early_stopping_patience": 2}
    job_id = laptop.submit(laptop.spec("stops", validation=0.25, train=train))
    job = laptop.finished(job_id)
    assert version_of(job)
    assert job.progress is not None
    assert job.result is not None
    metrics = job.result["metrics"]
    assert job.progress["step"] == metrics["step"] < job.progress["steps"]
    assert metrics["validation_step"] == metrics["step"] - 20 == job.progress["best_step"]
    assert metrics["validation_loss"] < metrics["validation_loss_before"]
    assert 0 < metrics["validation_accuracy"] <= 1
    assert "stopped early after step" in metrics["stopped"]
    messages = [event.message for event in laptop.queue.events(job_id)]
    assert sum("validation loss" in message for message in messages) == metrics["step"] / 10
    assert any("stopped early after step" in message for message in messages)
    with urllib.request.urlopen(f"http://127.0.0.1:{laptop.metrics_port}/metrics", timeout=10) as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#"))
    assert float(lines[f'lora_job_validation_loss{{job="{job_id}"}}']) == pytest.approx(job.progress["validation_loss"])
    assert float(lines[f'lora_job_validation_accuracy{{job="{job_id}"}}']) > 0


def test_a_killed_client_leaves_its_job_and_the_queue_alone(laptop: Laptop) -> None:
    spec, second = laptop.spec("orphan"), laptop.spec("second")
    client = subprocess.Popen(
        [sys.executable, "-m", "jobs", "submit", str(spec)],
        env=laptop.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert client.stdout is not None
    job_id = next(line.split()[0] for line in client.stdout if line.startswith("job-"))
    client.kill()
    client.wait()
    later = laptop.submit(second)
    assert laptop.finished(job_id).status is JobStatus.SUCCEEDED
    assert laptop.finished(later).status is JobStatus.SUCCEEDED


def test_interrupting_the_client_leaves_its_job_running(laptop: Laptop) -> None:
    client = subprocess.Popen(
        [sys.executable, "-m", "jobs", "submit", str(laptop.spec("interrupted", steps=120))],
        env=laptop.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As from a terminal: where tests run in the background, Ctrl-C is ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert client.stdout is not None
    job_id = next(line.split()[0] for line in client.stdout if line.startswith("job-"))
    client.send_signal(signal.SIGINT)
    _, errors = client.communicate(timeout=WAIT)
    assert client.returncode == 130
    assert "goes on without you" in errors
    assert laptop.finished(job_id).status is JobStatus.SUCCEEDED


def test_a_job_that_dies_in_a_rank_fails_with_its_reason_and_the_one_beside_it_goes_on(laptop: Laptop) -> None:
    beside = laptop.submit(laptop.spec("bystander", steps=20_000))
    laptop.wait(beside, lambda job: bool(job.progress and job.progress["step"] > 0))
    bad = laptop.spec("bad", steps=2000)
    settings = laptop.settings.model_copy(update={"base_models": {"tiny": str(laptop.home / "tiny")}})
    examples = examples_key(admit(load_spec(bad), settings, 2).examples_sha)
    # There before the job is submitted, under the name of its encoded rows: the ranks must notice by the checksum.
    (laptop.home / "storage" / examples).write_text("not what was accepted")
    bad_id = laptop.submit(bad)
    done = laptop.jobs("logs", "-f", bad_id)
    assert done.returncode == 1
    failed = laptop.queue.get(bad_id)
    assert failed.status is JobStatus.FAILED
    assert failed.error is not None
    assert "StorageCorrupt" in failed.error
    assert "Traceback" not in failed.error
    assert failed.session_id == laptop.queue.get(beside).session_id
    step = (laptop.queue.get(beside).progress or {})["step"]
    laptop.wait(beside, lambda job: bool(job.progress and job.progress["step"] > step))
    laptop.queue.request(beside, RequestedAction.CANCEL)
    assert laptop.finished(beside).status is JobStatus.CANCELLED


def test_a_store_that_is_away_at_the_end_costs_time_and_not_the_adapter(laptop: Laptop) -> None:
    folder = laptop.home / "storage" / "adapters" / "default" / "tiny"
    folder.mkdir(parents=True, exist_ok=True)
    in_the_way = folder / "stubborn"
    in_the_way.write_text("a file where the adapter's folder has to be")
    job_id = laptop.submit(laptop.spec("stubborn", steps=200))
    laptop.wait(job_id, lambda job: bool(job.progress and job.progress["step"] > 0) or job.finished_at is not None)
    time.sleep(3)
    assert laptop.queue.get(job_id).status is JobStatus.RUNNING
    in_the_way.unlink()
    job = laptop.finished(job_id)
    assert job.status is JobStatus.SUCCEEDED
    assert job.attempt == 1
    assert version_of(job)


def test_diverging_says_at_which_step_and_what_to_change(laptop: Laptop) -> None:
    spec = laptop.spec("diverging", train={"epochs": 50, "batch_size": 4, "learning_rate": 1e30, "max_grad_norm": 1e30})
    failed = laptop.finished(laptop.submit(spec))
    assert failed.status is JobStatus.FAILED
    assert failed.error is not None
    assert "lower learning_rate" in failed.error


def test_cancelling_a_running_job_ends_it_between_two_steps(laptop: Laptop) -> None:
    job_id = laptop.submit(laptop.spec("endless", steps=20_000))
    laptop.wait(job_id, lambda job: bool(job.progress and job.progress["step"] > 5))
    assert laptop.jobs("cancel", job_id).returncode == 0
    assert laptop.finished(job_id).status is JobStatus.CANCELLED
    assert laptop.finished(laptop.submit(laptop.spec("next"))).status is JobStatus.SUCCEEDED


def test_metrics_tell_what_the_queue_holds(laptop: Laptop) -> None:
    job_id = laptop.submit(laptop.spec("measured"))
    laptop.finished(job_id)
    with urllib.request.urlopen(f"http://127.0.0.1:{laptop.metrics_port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    succeeded = len(laptop.queue.list(statuses={JobStatus.SUCCEEDED}))
    assert float(lines['lora_jobs{status="succeeded"}']) == succeeded
    assert float(lines[f'lora_job_tokens_total{{adapter="tiny:measured",job="{job_id}"}}']) > 0
    assert float(lines[f'lora_job_loss{{job="{job_id}"}}']) > 0
    assert float(lines[f'lora_job_step{{job="{job_id}"}}']) == 20
    assert float(lines["lora_queue_oldest_seconds"]) == 0


def test_a_killed_rank_without_others_goes_on_to_the_same_best_adapter(laptop: Laptop) -> None:
    """One rank, killed after evaluations: the best weights so far come back with the checkpoint."""
    train = {"epochs": 60, "batch_size": 4, "learning_rate": 0.01, "eval_steps": 20, "load_best_model_at_end": True}
    spec = laptop.spec("alone", num_workers=1, validation=0.25, train=train)
    undisturbed = laptop.finished(laptop.submit(spec))
    job_id = laptop.submit(spec, "--again")
    laptop.wait(job_id, lambda job: bool(job.progress and job.progress["step"] >= 50))
    (victim,) = [rank for rank in laptop.ranks() if rank.environ().get("RANK", "0") == "0"][-1:]
    victim.kill()
    job = laptop.finished(job_id)
    assert version_of(job) == version_of(undisturbed)
    assert any("rank was lost" in event.message for event in laptop.queue.events(job_id))
    assert job.result is not None
    assert undisturbed.result is not None
    assert job.result["metrics"] == undisturbed.result["metrics"]


def test_openais_client_trains_an_adapter_and_asks_it(laptop: Laptop) -> None:
    """Through a service on the laptop's own Ray, whose scheduler finds what the API has put into the queue."""
    laptop.submit(laptop.spec("rows"))
    with laptop.here():
        url = served(laptop.settings)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
    file = client.files.create(file=laptop.home / "rows.jsonl", purpose="fine-tune")
    pairs = preferences(client, laptop.home)
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        suffix="asked",
        hyperparameters={"n_epochs": 5, "batch_size": 4},
        extra_body={"lora": {"r": 4}, "precision": "fp32", "num_workers": 2},
    )
    laptop.finished(job.id)
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert (job.status, job.fine_tuned_model) == ("succeeded", "tiny:asked@1"), job.error
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [16, 12, 8, 4]
    early = checkpoints[-1].fine_tuned_model_checkpoint
    answer = client.chat.completions.create(model=early, messages=[{"role": "user", "content": "item"}], max_tokens=4)
    assert answer.system_fingerprint == client.models.retrieve(early).to_dict()["digest"]
    events = list(client.fine_tuning.jobs.list_events(job.id))
    steps = [event.data["step"] for event in events if event.type == "metrics" and isinstance(event.data, dict)]
    assert steps == sorted(steps, reverse=True) and steps[0] == 20
    assert client.files.content(job.result_files[0]).text.splitlines()[-1].startswith("20,")
    model = client.models.retrieve(str(job.fine_tuned_model)).to_dict()
    answer = client.chat.completions.create(
        model=str(job.fine_tuned_model), messages=[{"role": "user", "content": "item"}], max_tokens=4
    )
    assert answer.system_fingerprint == model["digest"] and model["job"] == job.id
    capacity: Any = client.get("/capacity", cast_to=object)
    (replica,) = capacity["bases"][0]["replicas"]
    assert [replica["place"]] * 2 in [session["places"] for session in capacity["sessions"]], "by one name for both"
    check_preferences(client, laptop.finished(pairs).id)


def preferences(client: openai.OpenAI, home: Path) -> str:
    """A job that learns from some, with the other one in a session."""
    answers = [[{"role": "assistant", "content": text}] for text in ("Yes, it is.", "No way!")]
    rows = [
        {"input": {"messages": [{"role": "user", "content": f"Is {number} a number?"}]},
         "preferred_output": answers[0], "non_preferred_output": answers[1]} for number in range(12)
    ]  # fmt: skip
    (home / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = client.files.create(file=home / "pairs.jsonl", purpose="fine-tune")
    assert client.files.wait_for_processing(file.id).status == "processed"
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        suffix="polite",
        method={"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 4, "batch_size": 4, "beta": 0.5}}},
        extra_body={"lora": {"r": 4}, "train": {"learning_rate": 0.005}, "precision": "fp32", "num_workers": 2,
                    "validation": 0.25},
    )  # fmt: skip
    return job.id


def check_preferences(client: openai.OpenAI, job_id: str) -> None:
    """Its loss began at that of a coin, and pairs that it never saw are told apart."""
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert (job.status, job.fine_tuned_model) == ("succeeded", "tiny:polite@1"), job.error
    metrics: Any = client.models.retrieve("tiny:polite").to_dict()["metrics"]
    assert metrics["first_loss"] == pytest.approx(math.log(2), rel=1e-3) and metrics["loss"] < metrics["first_loss"]
    assert metrics["validation_loss"] < metrics["validation_loss_before"] == pytest.approx(math.log(2), rel=1e-3)
    assert metrics["validation_accuracy"] == 1.0 and metrics["validation_reward_margin"] > 0
    *_, last = csv.DictReader(client.files.content(job.result_files[0]).text.splitlines())
    assert float(last["train_reward_margin"]) == metrics["reward_margin"] and last["valid_reward_accuracy"] == "1.0"


def test_prometheus_has_what_alerts_and_dashboards_ask_for(laptop: Laptop, tmp_path: Path) -> None:
    """Scraped as the PodMonitors say, during a job and some answers: every metric is there with the labels that are
    read, and every query of a dashboard that needs no GPU has data.
    """
    with laptop.here():
        url = served(laptop.settings)
    (monitor,) = [one for one in render("gpu") if one["kind"] == "PodMonitor" and "scheduler" in str(one["spec"])]
    honours = [endpoint["honorLabels"] for endpoint in monitor["spec"]["podMetricsEndpoints"]]
    embedded = find_embedded(laptop.settings)
    assert embedded is not None
    bearer = {"authorization": f"Bearer {Path(embedded.token_path).read_text()}"}
    found = requests.get(f"{embedded.api_url}/api/prometheus/sd", headers=bearer, timeout=10)
    targets = [target for group in found.json() for target in group["targets"]]
    targets.append(f"127.0.0.1:{laptop.metrics_port}")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
    with running_prometheus(tmp_path / "prometheus", targets, all(honours)) as prometheus:
        train = {"epochs": 10_000, "batch_size": 4, "eval_steps": 10}
        job_id = laptop.submit(laptop.spec("watched", validation=0.25, train=train))
        laptop.wait(job_id, lambda job: bool(job.progress and job.progress["step"] >= 10))
        waiting = {name: queries for name, queries in panels().items() if not name.startswith("sessions: GPU")}
        deadline = time.monotonic() + 60
        while waiting and time.monotonic() < deadline:
            client.chat.completions.create(
                model="tiny:asked", messages=[{"role": "user", "content": "item"}], max_tokens=4
            )
            time.sleep(1)
            waiting = {name: queries for name, queries in waiting.items() if not all(map(prometheus.query, queries))}
        assert waiting == {}
        assert prometheus.query(f'lora_job_step{{job="{job_id}"}}')  # and not the scrape's own job
        unseen = {name for name in NODE_METRICS if "gpu" in name or "gram" in name}
        unseen |= {metrics.ADAPTER_LOAD_FAILURES.exported, metrics.API_ERRORS.exported}  # nothing has failed
        unseen |= {metrics.SESSION_FAILED_ROUNDS.exported}
        for query in queries():
            for metric, labels in labels_read(query).items():
                if metric not in unseen and not metric.startswith("lora:"):
                    kept = set().union(*prometheus.series(metric))
                    assert labels <= kept, (metric, query)
    laptop.queue.request(job_id, RequestedAction.CANCEL)
    laptop.finished(job_id)


def test_stop_leaves_nothing_running(laptop: Laptop) -> None:
    laptop.submit(laptop.spec("cut_short", steps=20_000))
    time.sleep(5)
    assert laptop.jobs("stop").returncode == 0
    time.sleep(1)
    left = []
    for process in psutil.process_iter(["cmdline", "status"]):
        try:
            if process.environ().get("LORA_HOME") == str(laptop.home) and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process.info["cmdline"])
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    assert left == []
