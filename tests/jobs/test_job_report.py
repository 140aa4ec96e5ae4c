"""`python -m jobs show`: what a person wants to know, and no rows of internals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from jobs.__main__ import main
from jobs.job import EventKind, JobStatus, RequestedAction, SessionKey, SessionState
from jobs.job_report import progress_text
from jobs.spec import JobSpec
from jobs.store.jobs import JobQueue

PROGRESS = {
    "step": 30, "steps": 40, "loss": 0.21422954039140182, "first_loss": 2.5, "tokens": 3000, "supervised_tokens": 900,
    "tokens_per_second": 12.345, "step_seconds": 0.7, "trainable_parameters": 10, "base_parameters": 1000,
    "base_bytes": 2000, "validation_loss_before": 2.0, "validation_loss": 0.30004, "validation_accuracy": 0.9,
    "validation_step": 20,
}  # fmt: skip


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobQueue:
    monkeypatch.setenv("LORA_HOME", str(tmp_path))
    monkeypatch.setenv("LORA_BASE_MODELS", '{"tiny": "/models/tiny"}')
    monkeypatch.setattr("jobs.__main__.log_to_stderr", lambda _: None)
    return JobQueue(f"sqlite:///{tmp_path / 'lora.db'}")


def submitted(queue: JobQueue, base: str = "tiny") -> str:
    spec = JobSpec.model_validate(
        {
            "base_model": base, "dataset": "/rows.jsonl", "adapter": "a", "validation": 0.1, "precision": "fp32",
            "lora": {"r": 4, "lora_alpha": 32}, "train": {"epochs": 3, "learning_rate": 0.01}, "num_workers": 2,
        }
    )  # fmt: skip
    return queue.submit(spec, cluster="c", base=base, dataset_sha="d", code_version="v")[0].id


def started(queue: JobQueue, job_id: str) -> str:
    session = queue.create_session(SessionKey("tiny", "fp32", 2), "c")
    assert session is not None
    assert queue.session_move(session.id, SessionState.LAUNCHING, SessionState.RUNNING, reason="up", fence=1)
    assert queue.assign(job_id, session.id)
    assert queue.progress(job_id, session.id, 1, PROGRESS)
    return session.id


def shown(job_id: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert main(["show", job_id]) == 0
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "THEN", capsys.readouterr().out)
    return [line.rstrip() for line in text.replace(job_id, "JOB").splitlines()]


SETTINGS = (
    "  settings   dataset /rows.jsonl, validation 0.1, precision fp32, num_workers 2, lora.r 4"
    ", train.learning_rate 0.01"
)


def test_a_job_that_waits(queue: JobQueue, capsys: pytest.CaptureFixture[str]) -> None:
    job_id = submitted(queue)
    queue.log(job_id, "waits: 2 jobs before it in line", kind=EventKind.WAITS)
    queue.log(job_id, "waits: 1 job before it in line", kind=EventKind.WAITS)
    assert shown(job_id, capsys) == [
        "JOB  queued since THEN  tiny:a",
        "  why        waits: 1 job before it in line",
        "  session    none yet, on c: tiny in precision fp32, 2 workers",
        SETTINGS,
        "  history",
        "    THEN submitted",
        "    THEN waits: 2 jobs before it in line",
        "    THEN waits: 1 job before it in line",
    ]


def test_a_job_that_runs(queue: JobQueue, capsys: pytest.CaptureFixture[str]) -> None:
    job_id = submitted(queue)
    session_id = started(queue, job_id)
    assert shown(job_id, capsys) == [
        "JOB  running since THEN  tiny:a",
        "  progress   step 30 of 40, loss 0.2142 (2.5000 at the first step), 12 tokens/s, 1:21 left",
        "  result     validation loss 0.3000 after step 20 (2.0000 before), token accuracy 90.0%",
        f"  session    {session_id}-a1 (running) on c: tiny in precision fp32, 2 workers, attempt 1",
        SETTINGS,
        "  history",
        "    THEN submitted",
        f"    THEN assigned to {session_id}",
    ]
    facts = {"precision": "fp32", "why": "as asked for", "forward_path": "llama", "exactness": "bit for bit"}
    queue.resolve_session(session_id, 1, facts)
    assert shown(job_id, capsys)[3].endswith("attempt 1; it is fp32, as asked for; path: llama; exact: bit for bit")
    queue.request(job_id, RequestedAction.CANCEL)
    assert shown(job_id, capsys)[1] == "  why        it is asked to cancel, after its current step"


def test_a_job_that_learns_from_pairs_is_told_by_its_rewards(
    queue: JobQueue, capsys: pytest.CaptureFixture[str]
) -> None:
    job_id = submitted(queue)
    session_id = started(queue, job_id)
    progress: Any = PROGRESS | {"reward_accuracy": 0.75, "reward_margin": 0.5, "validation_reward_margin": 0.25}
    assert queue.progress(job_id, session_id, 1, progress)
    result = (
        "  result     validation loss 0.3000 after step 20 (2.0000 before), reward accuracy 90.0%, reward margin 0.2500"
    )
    assert shown(job_id, capsys)[2] == result
    assert "loss 0.2142  margin 0.5000  validation 0.3000" in progress_text(progress)


@pytest.mark.parametrize("base", ["tiny", "other"])
def test_a_job_that_succeeded(queue: JobQueue, capsys: pytest.CaptureFixture[str], base: str) -> None:
    job_id = submitted(queue, base)
    session_id = started(queue, job_id)
    result = {"model": f"{base}:a", "version": "0123", "digest": "d" * 64, "adapter_bytes": 1, "metrics": {"step": 40}}
    queue.move(
        job_id, JobStatus.RUNNING, JobStatus.SUCCEEDED, message="published", fence=(session_id, 1), result=result
    )
    first, progress, published, chat, *_ = shown(job_id, capsys)
    assert first == f"JOB  succeeded since THEN  {base}:a"
    assert progress.endswith("12 tokens/s")
    assert published == f"  published  {base}:a version 0123"
    command, _, note = chat.partition("  # ")
    assert "http://127.0.0.1:8000/v1/chat/completions -H" in command
    assert json.loads(command[command.index("{") : command.rindex("}") + 1])["model"] == f"{base}:a"
    alias = "" if base == "tiny" else ", with an alias other of its base in LORA_BASE_MODELS"
    assert note == f"after serve run deploy.app:app{alias}"


def test_a_job_that_failed(queue: JobQueue, capsys: pytest.CaptureFixture[str]) -> None:
    job_id = submitted(queue)
    queue.move(job_id, JobStatus.QUEUED, JobStatus.FAILED, message="no room", error="out of memory: use nf4.")
    first, why, *_, last = shown(job_id, capsys)
    assert first == "JOB  failed since THEN  tiny:a"
    assert why == (
        "  why        out of memory: use nf4. Change that, and submit it again: a job that failed is in nobody's way"
    )
    assert last == "    THEN error: no room"
