"""The API with the tables and the registry behind it, two tenants, and what a session does to a job."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
from openai.types.fine_tuning import FineTuningJob

from cluster.registry import AdapterRegistry
from cluster.settings import Settings
from cluster.storage.directory import open_storage
from jobs.job import EventKind, JobStatus, JobSteps, SessionKey, SessionState, StepMetrics
from jobs.store.api_keys import KeyTable, Scope
from jobs.store.database import Database
from jobs.store.jobs import JobQueue
from tests.support.api_server import Hello, running_gateway
from tests.support.tiny_models import save_tiny_model

ROWS = [{"prompt": f"item {i}: ", "completion": f"code {i}"} for i in range(10)]
FIGURES: Any = {"step": 6, "loss": 0.5, "first_loss": 2.0, "tokens": 600, "supervised_tokens": 60}


class Site:
    """A running gateway, the queue and registry behind it, and a client for each tenant."""

    def __init__(self, home: Path, url: str, settings: Settings, base: Hello, gateway: Any) -> None:
        self.url, self.base, self.gateway = url, base, gateway
        self.database = Database(settings.database_url)
        self.queue = JobQueue(self.database)
        self.rows = home / "rows.jsonl"
        self.rows.write_text("\n".join(json.dumps(row) for row in ROWS))
        self.client, self.other = self.key("acme", Scope.ADMIN), self.key("other", Scope.ADMIN)
        self.registry = AdapterRegistry(open_storage(settings.storage_url), "acme")

    def key(self, tenant: str, *scopes: Scope, **limits: int) -> openai.OpenAI:
        """The client of a new key, which counts already."""
        _, secret = KeyTable(self.database).create(tenant, frozenset(scopes), **limits)
        self.gateway._keys.load()
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=secret, max_retries=0)

    def create(self, suffix: str, headers: dict[str, str] | None = None, **options: Any) -> FineTuningJob:
        sent = {"model": "tiny", "training_file": str(self.rows), "suffix": suffix, **options}
        return self.client.fine_tuning.jobs.create(**sent, extra_headers=headers)

    def start(self, job_id: str) -> tuple[str, int]:
        """Have a session train it, as a scheduler does; returns that and its fence."""
        session = self.queue.create_session(SessionKey("tiny", "auto", 1), "c")
        assert session is not None
        up = SessionState.LAUNCHING, SessionState.RUNNING
        assert self.queue.session_move(session.id, *up, reason="up", fence=1) and self.queue.assign(job_id, session.id)
        return session.id, 1

    def train(self, job_id: str, fence: tuple[str, int] | None = None) -> str:
        """Bring a job to its end, as a session does, this one if it has begun; returns the version's digest."""
        fence = fence or self.start(job_id)
        pace: Any = {"steps": 8, "tokens_per_second": 100.0, "step_seconds": 1.0}
        assert self.queue.progress(job_id, *fence, FIGURES | pace)
        assert self.client.fine_tuning.jobs.retrieve(job_id).estimated_finish
        steps = [StepMetrics(step, 1000.0 + step, {"train_loss": 3.0 / step}) for step in (2, 4)]
        self.queue.record_steps(*fence, [JobSteps(job_id, FIGURES | pace, tuple(steps))])
        for step in (2, 4):
            files, figures = {"weights": f"{job_id} {step}".encode()}, FIGURES | {"step": step}
            kept = self.registry.keep("tiny", self.queue.get(job_id).spec.adapter, files, {"metrics": figures})
            data = {"model": str(kept), "metrics": figures | {"validation_loss": math.inf}}
            self.queue.log(job_id, f"checkpoint {kept}", kind=EventKind.CHECKPOINT, data=data)
        self.queue.log(job_id, "odd", data={"figures": [math.inf, 1]})
        validated = {"train_loss": 0.5, "valid_loss": 0.75, "valid_mean_token_accuracy": 0.5}
        self.queue.record_steps(*fence, [JobSteps(job_id, FIGURES | pace, (StepMetrics(6, 1006.0, validated),))])
        job = self.queue.get(job_id)
        manifest = {"job": job_id, "dataset_sha256": job.dataset_sha, "base_fingerprint": "f", "metrics": FIGURES}
        version = self.registry.publish("tiny", job.spec.adapter, {"weights": job_id.encode()}, manifest)
        result: Any = {"model": f"tiny:{job.spec.adapter}", "version": version.version, "number": version.number,
                       "digest": version.digest, "adapter_bytes": 1, "metrics": FIGURES}  # fmt: skip
        moved = JobStatus.RUNNING, JobStatus.SUCCEEDED
        assert self.queue.move(job_id, *moved, message="published", fence=fence, result=result)
        return version.digest


@contextmanager
def running_site(home: Path) -> Iterator[Site]:
    """Yield a site whose base is `tiny`, with two workers."""
    models = {"tiny": str(save_tiny_model("llama", home / "tiny"))}
    settings = Settings(
        home=home, base_models=models, cluster="c", max_workers=2, key_seconds=0.02, notice_seconds=0.02,
        webhook_networks=["127.0.0.0/8"],
    )  # fmt: skip
    with running_gateway(settings) as (url, base, gateway):
        yield Site(home, url, settings, base, gateway)
