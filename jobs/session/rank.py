"""What one rank of a session does: load the frozen base, then train whatever jobs it is told to, all of them together.

    while True:
        desired = agree()                  rank 0 asks the mailbox and broadcasts: ranks join and leave at one place
        join / leave                       what a newcomer needs is read beside the steps of the others
        outcomes = engine.micro_batch()    a fair share of every job; those whose batch is complete step
        report, checkpoint, finish

Every rank holds the same adapters, since each optimizer step ends in an all-reduce; so rank 0 alone reports and writes.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from cluster.settings import Settings
from cluster.sources import local_source
from cluster.storage.base import Storage
from cluster.storage.directory import open_storage
from cluster.storage.keys import checkpoint_state_key
from jobs.job import FailureCode
from jobs.session.collectives import Collectives, PeerLostError, joined_ranks
from jobs.session.failures import failure_code
from jobs.session.loader import JobReader, Read
from jobs.session.messages import (
    AdapterKept,
    Assignment,
    CheckpointWritten,
    DesiredJobs,
    Evaluated,
    Expected,
    JobFailed,
    NoRoom,
    RankBroke,
    RanksMailbox,
    RanksStarted,
    RungReached,
    Trained,
)
from jobs.session.report import ActiveJob
from jobs.session.step_reporter import StepReporter
from lora_core.adapters.peft_format import adapter_files
from lora_core.kernels.transfer import arrival
from lora_core.models.base import BaseModel, Precision, load_base, resolve_precision
from lora_core.models.exactness import Exactness
from lora_core.models.forward import ForwardPath, open_forward
from lora_core.models.places import place_of
from lora_core.models.probes import probe_losses
from lora_core.training.checkpoints import CheckpointWriter
from lora_core.training.engine import TrainEngine
from lora_core.training.job import JobDiverged
from lora_core.training.memory.predictor import NoRoomBesideError, available_bytes
from lora_core.training.optimizer import Snapshot

log = logging.getLogger("lora.rank")

IDLE_POLL_SECONDS = 0.2


def train_loop(config: dict[str, Any]) -> None:
    """Run one rank, as Ray Train does on each; see `Rank.run`."""
    settings: Settings = config["settings"]
    mailbox, storage = RanksMailbox(config["mailbox"]), open_storage(settings.storage_url)
    of_base = config["base_model"], config["precision"], config["forward_path"]
    with joined_ranks(on_gpus=config["on_gpus"]) as collectives:
        log.info("rank=%d event=joined_ranks", collectives.rank)
        Rank(settings, mailbox, storage, collectives, *of_base).run()


class Rank:
    """One data-parallel rank: the engine, the jobs on it, and the collectives through which ranks stay in step."""

    def __init__(
        self,
        settings: Settings,
        mailbox: RanksMailbox,
        storage: Storage,
        collectives: Collectives,
        base_model: str,
        precision: Precision,
        forward_path: ForwardPath | None = None,
    ) -> None:
        self.settings, self.mailbox, self.storage, self.collectives = settings, mailbox, storage, collectives
        self.rank, self.ranks = collectives.rank, collectives.ranks
        self.active: dict[str, ActiveJob] = {}
        # Done, and desired until the driver knows that: what a rank did not hold then, it would train again.
        self.publishing: dict[str, Assignment] = {}
        self._pausing: dict[str, tuple[Assignment, Future[None]]] = {}  # until their checkpoints are written
        self._base_model, self._precision, self._forward_path = base_model, precision, forward_path
        self._checkpoints = CheckpointWriter(settings.checkpoint_seconds, self._upload)
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._publishes: dict[str, Future[None]] = {}
        self._reporter = StepReporter(mailbox)
        torch.set_num_threads(settings.threads or max(1, len(os.sched_getaffinity(0)) // collectives.local_ranks))

    def run(self) -> None:
        """Train until told to stop. What breaks it is told, with the jobs that it may be blamed on."""
        self._reporter.start()
        try:
            self._train()
        except PeerLostError:
            self._finish_publishing()
            raise
        except Exception as error:
            self._reporter.stop()
            reason = f"{type(error).__name__}: {error}"
            log.exception("rank=%d event=broke", self.rank)
            suspects, trace = (*self.active, *self._finish_publishing()), traceback.format_exc()
            self.mailbox.deliver(RankBroke(self.rank, reason, suspects, trace, failure_code(error)))
            raise
        finally:
            self._reporter.stop()

    def _train(self) -> None:
        self.base = self._load_base()
        # Python's collector need not look through the base and the libraries again: that held up steps for 0.25 s.
        gc.collect()
        gc.freeze()
        # Jobs that were queued before they knew their path may have any adapter.
        forward = open_forward(self.base, self._forward_path or ("llama" if self.base.is_quantised else "hooks"))
        answers = self.collectives.gather(json.dumps(asdict(forward.exactness())))
        exactness = Exactness.of_all([Exactness(**json.loads(answer or "{}")) for answer in answers])
        places = self.collectives.gather(place_of(self.base.device))
        if self.rank == 0:
            why = self.base.precision, self.base.why, forward.name, str(exactness)
            self.mailbox.send(RanksStarted(*why, tuple(str(place) for place in places)))
        # NCCL takes its buffers at the first collective: before what is left is counted.
        self.collectives.all_reduce(torch.zeros(1, device=self.base.device))
        self.engine = TrainEngine(
            self.base,
            forward=forward,
            capacity=None,
            budget_bytes=min(int(share or 0) for share in self.collectives.gather(str(self._share_of_memory()))),
            exactness=exactness,
            rank=self.rank,
            ranks=self.ranks,
            all_reduce=self.collectives.all_reduce,
        )
        self.reader = JobReader(self.storage, self.engine, self.rank)
        log.info("rank=%d event=ready", self.rank)
        while True:
            desired = self.collectives.agree(self._desired_jobs)
            for job_id in [job_id for job_id in self.active if job_id not in {a.job_id for a in desired.assignments}]:
                if job_id in desired.pausing:
                    self._pause(self.active[job_id])
                self._leave(job_id)
            self._let_go(desired)
            self.reader.prepare(desired.assignments, self.assigned)
            if desired.stop:
                return
            for job_id in self._prepared_everywhere():
                self._join(*self.reader.reading.pop(job_id))
            if not self.active:
                time.sleep(IDLE_POLL_SECONDS)
                continue
            self._step()

    def _load_base(self) -> BaseModel:
        cache = self.settings.cache_dir
        source = local_source(self.settings.resolve_base(self._base_model), cache)
        # One answer for all: ranks that each measured might choose differently.
        chosen = self.collectives.agree(lambda: resolve_precision(self._precision, source, cache_dir=cache))
        base = load_base(source, precision=chosen.precision, cache_dir=cache)  # type: ignore[arg-type]
        self._flop_per_second = chosen.flop_per_second
        base = replace(base, why=chosen.why)
        fingerprints = self.collectives.gather(base.fingerprint)
        if len(set(fingerprints)) > 1:
            raise RuntimeError(
                f"the ranks loaded different weights of {self._base_model}: {sorted(map(str, set(fingerprints)))}"
            )
        log.info(
            "rank=%d event=base_loaded fingerprint=%s precision=%s (%s) device=%s backend=%s",
            self.rank, base.fingerprint[:12], base.precision, base.why, base.device, self.collectives.backend,
        )  # fmt: skip
        return base

    def _share_of_memory(self) -> int:
        """Return this rank's share of its node's memory, which ranks on CPUs have in common."""
        available = available_bytes(self.base.device)
        return available if self.base.device.type == "cuda" else available // self.collectives.local_ranks

    @property
    def assigned(self) -> dict[str, Assignment]:
        """What was desired and this rank has."""
        self._pausing = {job_id: one for job_id, one in self._pausing.items() if not one[1].done()}
        pausing = {job_id: assignment for job_id, (assignment, _) in self._pausing.items()}
        return {job_id: active.assignment for job_id, active in self.active.items()} | self.publishing | pausing

    def _desired_jobs(self) -> DesiredJobs:
        """Ask without waiting while there is work: an answer that is not there yet is taken at the next step."""
        desired = self.mailbox.desired(tuple(self.assigned), wait=not self.active)
        if desired is not None:
            return desired
        reading = (assignment for assignment, _ in self.reader.reading.values())
        return DesiredJobs((*self.assigned.values(), *reading))

    def _prepared_everywhere(self) -> list[str]:
        """Name the jobs that every rank has read, or failed to; in the same order on all."""
        if not self.reader.reading:
            return []
        done = json.dumps([job_id for job_id, (_, work) in self.reader.reading.items() if work.done()])
        everywhere = [set(json.loads(of_rank or "[]")) for of_rank in self.collectives.gather(done)]
        return [job_id for job_id in self.reader.reading if all(job_id in of_rank for of_rank in everywhere)]

    def _join(self, assignment: Assignment, work: Read) -> None:
        """Take a job in on all ranks, or on none: a rank that cannot is a reason for all to leave it."""
        live, problem, no_room, trace, code = None, None, False, None, FailureCode.UNKNOWN
        try:
            spec, prepared, tokenizer = work.result()
            live = self.engine.admit(prepared)
        except NoRoomBesideError as error:
            problem, no_room = str(error), True
        except Exception as error:  # whatever it is, it is this job's, and the others go on
            log.exception("job=%s rank=%d event=join_failed", assignment.job_id, self.rank)
            problem, code = f"rank {self.rank}: {type(error).__name__}: {error}", failure_code(error)
            trace = traceback.format_exc()
        answers = self.collectives.gather(problem if problem is None else json.dumps([no_room, problem, trace, code]))
        problems = [json.loads(answer) for answer in answers if answer is not None]
        if problems or live is None:
            if live is not None:
                self.engine.remove(assignment.job_id)
            hopeless = [
                (text, trace, FailureCode(code)) for only_beside, text, trace, code in problems if not only_beside
            ]
            if hopeless:
                self._fail(assignment.job_id, *hopeless[0])
            elif self.rank == 0:
                log.info(
                    "job=%s event=no_room beside=%d reason=%s", assignment.job_id, len(self.active), problems[0][1]
                )
                self.mailbox.deliver(NoRoom(assignment.job_id, max(1, len(self.active))))
            return
        live.optimizer.synchronise(self.collectives.broadcast)
        active = ActiveJob(assignment, spec, live, tokenizer, started_tokens=live.progress.tokens)
        active.kept_step = max(0, live.progress.step - 1)  # that of a rank that was lost may not have arrived
        self.active[assignment.job_id] = active
        if self.rank == 0 and self._flop_per_second is not None:
            seconds = active.expected_seconds(self.base, self._flop_per_second, self.ranks)
            self.mailbox.send(Expected(assignment.job_id, seconds))
        step, steps = live.progress.step, live.job.steps
        log.info("job=%s rank=%d event=joined step=%d of %d", assignment.job_id, self.rank, step, steps)

    def _pause(self, active: ActiveJob) -> None:
        """Write where it goes on from; the driver takes it to be here until that is done."""
        if self.rank == 0 and (writing := self._checkpoints.write(active.assignment, active.live)) is not None:
            self._pausing[active.assignment.job_id] = active.assignment, writing

    def _leave(self, job_id: str) -> None:
        self.engine.remove(job_id)
        del self.active[job_id]
        log.info("job=%s rank=%d event=left", job_id, self.rank)

    def _step(self) -> None:
        began, trained = time.monotonic(), 0
        for job_id, outcome in self.engine.micro_batch().items():
            active = self.active[job_id]
            trained += (tokens := active.end_step())
            if isinstance(outcome, JobDiverged):
                self._leave(job_id)
                self._fail(job_id, str(outcome), None, failure_code(outcome))
                continue
            if self.rank == 0:
                self._reporter.stepped(job_id, active.progress(self.base), active.step_metrics(outcome, tokens))
                if outcome.evaluation is not None:
                    self.mailbox.send(Evaluated(job_id, asdict(outcome.evaluation), active.live.progress.stopped))
        self._reporter.computed(trained, time.monotonic() - began)
        done = next((active for active in self.active.values() if active.live.done), None)
        if done is not None:
            (self._finish if done.assignment.until_step is None else self._come_to_rung)(done)
        for active in self.active.values():
            if self.rank == 0 and active.ends_kept_epoch and active.assignment.until_step is None:
                self._keep(active)
        if self.rank == 0:
            self._checkpoints.write_oldest({active.assignment: active.live for active in self.active.values()})

    def _upload(self, assignment: Assignment, step: int, snapshot: Snapshot) -> None:
        key = checkpoint_state_key(assignment.job_id, assignment.attempt, step)
        with tempfile.TemporaryDirectory() as folder:
            snapshot.write(path := Path(folder) / "state.safetensors")
            with path.open("rb") as written:
                sha256 = hashlib.file_digest(written, "sha256").hexdigest()
            self.storage.put(key, path)
        self._reporter.flush()
        # There before a job that is paused counts as gone.
        self.mailbox.deliver(CheckpointWritten(assignment.job_id, step, key, sha256))

    def _finish(self, active: ActiveJob) -> None:
        """Publish the adapter beside the next steps; all ranks let it go."""
        job = active.assignment.job_id
        if self.rank == 0:
            progress = active.progress(self.base)
            files, manifest = self._published(active)

            def publish() -> None:
                content = files()
                self._reporter.flush()
                self.mailbox.deliver(Trained(job, content, manifest, progress))

            self._publishes[job] = self._publisher.submit(publish)
        self.publishing[job] = active.assignment
        self._leave(job)

    def _come_to_rung(self, active: ActiveJob) -> None:
        """Write a trial where it waits for the others, beside the next steps; all ranks let it go."""
        job = active.assignment.job_id
        if self.rank == 0:
            step, loss = active.live.progress.step, active.validation_loss
            writing = self._checkpoints.write(active.assignment, active.live)

            def tell() -> None:
                if writing is not None:
                    writing.result()
                self.mailbox.deliver(RungReached(job, step, loss))

            self._publishes[job] = self._publisher.submit(tell)
        self.publishing[job] = active.assignment
        self._leave(job)

    def _keep(self, active: ActiveJob) -> None:
        """Publish what an adapter is after an epoch, beside the next steps."""
        job, active.kept_step = active.assignment.job_id, active.live.progress.step
        files, manifest = self._published(active)

        def publish() -> None:
            try:
                self.mailbox.deliver(AdapterKept(job, files(), manifest))
            except Exception:  # training goes on without it
                log.exception("job=%s event=not_kept", job)

        self._publisher.submit(publish)

    def _published(self, active: ActiveJob) -> tuple[Callable[[], dict[str, bytes]], dict[str, Any]]:
        """Return what makes the files of an adapter as it is now, and its manifest with the probes that a server
        replays.
        """
        losses = probe_losses(self.engine.forward, active.live.bound, active.probes)
        adapter, arrived = active.live.optimizer.on_host(), arrival(self.base.device)

        def files() -> dict[str, bytes]:
            arrived()
            return adapter_files(adapter, self.engine.forward.modules, self._base_model)

        return files, active.manifest(self.base, self.engine, losses)

    def _let_go(self, desired: DesiredJobs) -> None:
        """Forget what is published: it is not desired any more, or another attempt of it is. What is still being
        written goes on to be told, however its job was asked to leave meanwhile.
        """
        named = {(assignment.job_id, assignment.attempt) for assignment in desired.assignments}
        busy = {name for name, publish in self._publishes.items() if not publish.done()}
        self.publishing = {
            name: one for name, one in self.publishing.items() if (name, one.attempt) in named or name in busy
        }
        for job in [job for job, publish in self._publishes.items() if publish.done()]:
            self._publishes[job].result()  # raises what went wrong
            del self._publishes[job]

    def _finish_publishing(self) -> list[str]:
        """Wait until what has ended is published, so that it is not blamed; returns the jobs that could not be."""
        self._publisher.shutdown()
        return [job for job, publish in self._publishes.items() if publish.exception() is not None]

    def _fail(self, job_id: str, reason: str, trace: str | None, code: FailureCode) -> None:
        if self.rank == 0:
            self._reporter.flush()
            self.mailbox.deliver(JobFailed(job_id, reason, trace, code))
