"""`python -m jobs list | show | logs | cancel | top`, for people and for scripts, and the log of a job in storage."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.settings import Settings
from cluster.storage.directory import open_storage
from cluster.storage.keys import job_log_key, job_logs_prefix
from jobs.__main__ import main
from jobs.job import JobStatus, JobSteps, SessionKey, SessionState, StepMetrics
from jobs.job_log import JobLog, JobLogWriter
from jobs.screen import ProgressBar, sparkline
from jobs.spec import METADATA, JobSpec, SpecError, check_spec
from jobs.store.jobs import JobQueue
from tests.jobs.test_job_report import PROGRESS
from tests.support.tiny_models import save_tiny_model

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("LORA_HOME", str(tmp_path))
    monkeypatch.setattr("jobs.__main__.log_to_stderr", lambda _: None)
    return Settings(home=tmp_path)


@pytest.fixture
def queue(settings: Settings) -> JobQueue:
    return JobQueue(settings.database_url)


@pytest.fixture
def run(queue: JobQueue, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command's exit code and what it printed."""

    def run(*arguments: str) -> tuple[int, str]:
        code = main(list(arguments))
        return code, capsys.readouterr().out

    return run


def submitted(queue: JobQueue, adapter: str, tenant: str = "default", **metadata: str) -> str:
    values = {"base_model": "tiny", "dataset": "/rows.jsonl", "adapter": adapter, "metadata": metadata}
    options: Any = {"cluster": "local", "base": "tiny", "dataset_sha": "d", "code_version": "v", "tenant": tenant}
    return queue.submit(JobSpec.model_validate(values), **options)[0].id


def train(queue: JobQueue, job_id: str) -> str:
    """Have a session train it a little."""
    session = queue.create_session(SessionKey("tiny", "auto", 1), "local")
    assert session is not None
    assert queue.session_move(session.id, SessionState.LAUNCHING, SessionState.RUNNING, reason="up", fence=1)
    assert queue.assign(job_id, session.id)
    steps = tuple(StepMetrics(step, float(step), {"train_loss": 4.0 / step}) for step in range(1, 5))
    progress: Any = PROGRESS | {"loss": math.nan}
    assert queue.record_steps(session.id, 1, [JobSteps(job_id, progress, steps)], 1234.5)
    return session.id


def test_the_newest_jobs_are_listed_by_state_tenant_and_tag(queue: JobQueue, run: Run) -> None:
    ids = [submitted(queue, f"a{n}", team="x" if n % 2 else "[red]y") for n in range(5)]
    other = submitted(queue, "b", tenant="other")
    train(queue, ids[4])

    def listed(*arguments: str) -> list[str]:
        return [job["id"] for job in json.loads(run("list", "--json", *arguments)[1])]

    assert listed() == [other, *ids[::-1]]
    assert listed("--limit", "2") == [other, ids[4]]
    assert listed("--status", "running", "--status", "paused") == [ids[4]]
    assert listed("--tenant", "default", "--tag", "team=x") == [ids[3], ids[1]]
    code, text = run("list", "--limit", "2")
    assert code == 0 and text.splitlines() == [
        f"{other}  queued   -      -    tiny:b",
        f"{ids[4]}  running  30/40  nan  tiny:a4  team=[red]y",
        "older ones are left out: --limit 4 shows more",
    ]
    with pytest.raises(SpecError, match="metadata must be at most 16 pairs"):
        check_spec({"base_model": "b", "dataset": "d", "adapter": "a", "metadata": {"": "empty"}})
    assert METADATA.startswith("must be")


def test_a_person_who_looks_sees_tables_and_a_bar(
    queue: JobQueue, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job_id = submitted(queue, "a", team="[red]y")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    head, row = run("list")[1].splitlines()[:2]
    assert "job" in head and "adapter" in head and job_id in row and "team=[red]y" in row
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with ProgressBar() as bar:
        bar.show(PROGRESS)  # type: ignore[arg-type]
    assert "step 30/40  loss 0.2142  validation 0.3000" in capsys.readouterr().err


def test_a_job_is_shown_with_its_curve_and_as_json(queue: JobQueue, run: Run) -> None:
    job_id = submitted(queue, "a", team="x")
    session_id = train(queue, job_id)
    assert sparkline([1.0, 2.0, math.nan, 3.0, 4.0, 5.0], 5) == "▁▃▅▆█" and sparkline([math.nan]) == ""
    lines = run("show", job_id)[1].splitlines()
    assert f"  loss       {sparkline([4.0, 2.0, 4 / 3, 1.0])}" in lines and "  metadata   team=x" in lines
    shown = json.loads(run("show", job_id, "--json")[1])
    assert (shown["id"], shown["progress"]["loss"], shown["session"]["id"]) == (job_id, None, session_id)
    assert [one["train_loss"] for one in shown["steps"]] == [4.0, 2.0, 4 / 3, 1.0]
    assert shown["spec"]["metadata"] == shown["metadata"] == {"team": "x"} and len(shown["events"]) == 2
    assert "content_key" not in shown


def test_what_is_at_work_is_told(queue: JobQueue, run: Run) -> None:
    job_id, waiting = submitted(queue, "a"), submitted(queue, "b")
    session_id = train(queue, job_id)
    found = json.loads(run("top", "--json")[1])
    assert found["workers"] == {"used": 1, "all": None} and found["cluster"] == "local"
    assert (found["counts"]["queued"], found["counts"]["running"]) == (1, 1)
    (session,) = found["sessions"]
    assert (session["id"], session["tokens_per_second"], session["jobs"][0]["id"]) == (session_id, 1234.5, job_id)
    lines = run("top")[1].splitlines()
    assert lines[0].split() == ["local", "1", "1,234", "1", "queued,", "1", "running"]
    assert lines[1].startswith(session_id) and lines[2].split() == [job_id, "tiny:a", "30/40", "-"]
    assert json.loads(run("cancel", "--json", waiting)[1])["status"] == "cancelled"


def test_a_dry_run_says_what_a_job_comes_to_and_queues_nothing(
    queue: JobQueue, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long it takes only by a session of its kind: of the same base, precision, path and number of workers."""
    monkeypatch.setenv("LORA_BASE_MODELS", json.dumps({"tiny": str(save_tiny_model("llama", tmp_path / "tiny"))}))
    rows, spec = tmp_path / "rows.jsonl", tmp_path / "job.json"
    rows.write_text("\n".join(json.dumps({"prompt": f"item {n}: ", "completion": f"code {n}"}) for n in range(10)))
    values = {"base_model": "tiny", "dataset": str(rows), "adapter": "a", "precision": "fp32", "priority": 1}
    spec.write_text(json.dumps(values))

    def estimated() -> dict[str, Any]:
        code, text = run("submit", str(spec), "--dry-run", "--json")
        assert code == 0
        found: dict[str, Any] = json.loads(text)
        return found

    found = estimated()
    assert found["tokens"] == 3 * found["rows"]["tokens"] > 0 and found["rows"]["steps"] == 6
    assert 0 < found["memory"]["least"] <= found["memory"]["roomy"] and found["before"] == 0
    assert found["seconds"] is None and found["summary"]
    submitted(queue, "lower")
    for key, pace in (
        (SessionKey("tiny", "fp32", 1, "llama"), 100.0),
        (SessionKey("tiny", "fp32", 2, "llama"), 1.0),
        (SessionKey("other", "fp32", 1, "llama"), 1.0),
        (SessionKey("tiny", "bf16", 1, "llama"), 1.0),
    ):
        session = queue.create_session(key, "local")
        assert session is not None and queue.record_steps(session.id, 1, [], pace)
    again = estimated()
    assert again["seconds"] == found["tokens"] / 100.0 and again["before"] == 0
    text = run("submit", str(spec), "--dry-run")[1]
    assert f"6 steps, {found['tokens']:,} tokens" in text and "at 100 tokens/s" in text and "no waiting jobs" in text
    monkeypatch.setattr("sys.stderr", said := io.StringIO())
    gone = submitted(queue, "gone")
    queue.move(gone, JobStatus.QUEUED, JobStatus.CANCELLED, message="over")
    spec.write_text(json.dumps(values | {"num_workers": 1000, "depends_on": ["job-0"]}))
    assert run("submit", str(spec), "--depends-on", gone[:-1], "--dry-run")[0] == 2
    assert all(
        part in said.getvalue() for part in ("has 3 problems", f"{gone} was cancelled", "there is no job 'job-0'")
    )
    assert len(queue.list()) == 2


def test_a_sweep_is_submitted_and_shown_with_its_trials(
    queue: JobQueue, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_BASE_MODELS", json.dumps({"tiny": str(save_tiny_model("llama", tmp_path / "tiny"))}))
    monkeypatch.setattr("jobs.scheduling.scheduler.ensure_scheduler", lambda *_: None)
    rows, path = tmp_path / "rows.jsonl", tmp_path / "job.json"
    rows.write_text("\n".join(json.dumps({"prompt": f"item {n}: ", "completion": f"code {n}"}) for n in range(20)))
    values = {"base_model": "tiny", "dataset": str(rows), "adapter": "a", "precision": "fp32", "validation": 0.2}
    swept = {"sweep": {"r": [2, 4], "epochs": [2, 4], "init_lora_weights": [True, "pissa"]}}
    path.write_text(json.dumps(values | swept))
    found = json.loads(run("submit", str(path), "--dry-run", "--json")[1])
    assert (found["sweep"]["trials"], found["sweep"]["left"]) == (8, [2])
    assert found["sweep"]["grid_tokens"] == 24 * found["rows"]["tokens"] > found["tokens"] > 0
    text = run("submit", str(path), "--dry-run")[1]
    assert f"a sweep of 8, then 2 trials: at most about {found['tokens']:,} of the" in text and not queue.list()
    sweep_id = json.loads(run("submit", str(path), "--detach", "--json")[1])["id"]
    jobs = [queue.get(trial.job_id) for trial in queue.trials([sweep_id])[sweep_id]]
    assert [job.forward_path for job in jobs] == ["llama", "llama", "hooks", "hooks"] * 2
    assert [trial.steps for trial in queue.trials([sweep_id])[sweep_id]] == [4, 8] * 4
    assert {job.examples_sha for job in jobs} == {queue.get(sweep_id).examples_sha}
    assert [job["id"] for job in json.loads(run("list", "--json")[1])] == [sweep_id]
    assert len(json.loads(run("list", "--json", "--trials")[1])) == 9
    train(queue, jobs[0].id)
    shown = json.loads(run("show", sweep_id, "--json")[1])["trials"]
    assert (shown[0]["status"], shown[7]["parameters"]) == (
        "running", {"r": 4, "init_lora_weights": "pissa", "epochs": 4},
    )  # fmt: skip
    *_, first, last = [line.split() for line in run("show", sweep_id)[1].splitlines() if f"{sweep_id}-" in line]
    assert last == [f"{sweep_id}-8", "4", "pissa", "4", "queued", "0/8", "-"] and len(first) == 7
    assert json.loads(run("cancel", "--json", sweep_id)[1])["requested"] is None


def test_a_log_takes_any_characters(queue: JobQueue, settings: Settings) -> None:
    storage, job_id = open_storage(settings.storage_url), submitted(queue, "a")
    writer = JobLogWriter(storage, job_id, attempt=1)
    writer.add("half of an emoji \ud83d, a\u2028line and its \x85end")
    writer.write([])
    (line,) = JobLog(queue, job_id, storage).read(whole=True)[1:]
    assert line.message == "half of an emoji ?, a\u2028line and its \x85end"


def test_a_log_has_the_history_and_more_once_each(queue: JobQueue, settings: Settings, run: Run) -> None:
    """In pieces, whichever of them a reader has seen, and with what no driver has copied yet."""
    storage, job_id = open_storage(settings.storage_url), submitted(queue, "a")
    found = JobLogWriter(storage, job_id, attempt=0)
    found.add("330 rows")
    found.write([])
    reader = JobLog(queue, job_id, storage)
    assert [line.message for line in reader.read(whole=True)] == ["submitted", "330 rows"]
    first = JobLogWriter(storage, job_id, attempt=1)
    queue.log(job_id, "waits")
    assert [line.message for line in reader.read(whole=True)] == ["waits"]
    first.add("Traceback: why\n  here", level="error")
    first.write(queue.events(job_id, after=first.copied))
    first.write(queue.events(job_id, after=first.copied))
    assert [line.message for line in reader.read(whole=True)] == ["Traceback: why\n  here"]
    JobLogWriter(storage, job_id, attempt=2).write(queue.events(job_id))
    assert len(storage.list(job_logs_prefix(job_id))) == 3, "what is empty is no piece"
    queue.move(job_id, JobStatus.QUEUED, JobStatus.CANCELLED, message="cancelled on request")
    told = ["submitted", "330 rows", "waits", "Traceback: why\n  here", "cancelled on request"]
    code, text = run("logs", job_id)
    assert code == 0 and text == "".join(f"{line}\n" for line in text.splitlines())
    assert [part[9:] for part in text.replace("\n  here", "|").splitlines()] == [
        "submitted", "330 rows", "waits", "Traceback: why|", "cancelled on request"
    ]  # fmt: skip
    code, text = run("logs", "-f", "--json", job_id)
    assert code == 1 and [json.loads(line)["message"] for line in text.splitlines()] == told
    kept = [json.loads(line) for line in storage.get(job_log_key(job_id, 1, 0)).splitlines()]
    assert [(line["message"], line["level"]) for line in kept][1:] == [("waits", "info"), (told[3], "error")]
