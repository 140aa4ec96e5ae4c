"""What a job needs to join a rank, read and prepared on a thread beside the steps of those that train."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from cluster.storage.base import Storage, StorageUnavailable
from jobs.initial_adapter import load_initial
from jobs.session.messages import Assignment
from jobs.spec import JobSpec
from jobs.stored_examples import load_examples
from lora_core.training.active_job import PreparedJob
from lora_core.training.engine import TrainEngine
from lora_core.training.job import EngineJob

log = logging.getLogger("lora.rank")

STORAGE_PATIENCE, STORAGE_PAUSE = 600.0, 5.0

Read = Future[tuple[JobSpec, PreparedJob, str]]
"""What a job needs to join: its spec, itself with its rows, its adapter and the state of its optimizer, and the hash of
the tokenizer that read its rows."""


class JobReader:
    """One rank's reading. `reading` holds every job that is desired and has not joined, in that order."""

    def __init__(self, storage: Storage, engine: TrainEngine, rank: int) -> None:
        self.reading: dict[str, tuple[Assignment, Read]] = {}
        self._storage, self._engine, self._rank = storage, engine, rank
        self._wanted: set[str] = set()  # known before reading begins, which may end before it is in `reading`
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reader")

    def prepare(self, assignments: Sequence[Assignment], active: Collection[str]) -> None:
        """Read what new jobs need beside the steps of those that train; forget those no longer wanted."""
        self._wanted = {assignment.job_id for assignment in assignments}
        self.reading = {job_id: one for job_id, one in self.reading.items() if job_id in self._wanted}
        for assignment in assignments:
            if assignment.job_id not in active and assignment.job_id not in self.reading:
                work = self._thread.submit(self._read, assignment)
                self.reading[assignment.job_id] = assignment, work

    def _read(self, assignment: Assignment) -> tuple[JobSpec, PreparedJob, str]:
        """Read with patience while the storage does not answer: a job is worth more than a few minutes."""
        deadline = time.monotonic() + STORAGE_PATIENCE
        while True:
            try:
                return self._read_now(assignment)
            except StorageUnavailable as error:
                log.warning("job=%s rank=%d event=storage_away error=%r", assignment.job_id, self._rank, str(error))
                time.sleep(STORAGE_PAUSE)
                if assignment.job_id not in self._wanted or time.monotonic() > deadline:
                    raise

    def _read_now(self, assignment: Assignment) -> tuple[JobSpec, PreparedJob, str]:
        spec = JobSpec.model_validate_json(assignment.spec)
        if assignment.examples_sha is None:
            raise ValueError("an earlier version queued this job without what its rows became: submit it again")
        (train, held_out), tokenizer = load_examples(self._storage, assignment.examples_sha)
        validation = held_out.examples if held_out else []
        checkpoint, start = None, None
        if assignment.checkpoint_key is not None:
            checkpoint = self._storage.get(assignment.checkpoint_key, sha256=assignment.checkpoint_sha256)
        if assignment.init_adapter_sha is not None:
            base, modules = self._engine.base, self._engine.forward.modules
            start = load_initial(self._storage, assignment.init_adapter_sha, modules, base.fingerprint)
        rows, until = (train.examples, validation), assignment.until_step
        job = EngineJob(assignment.job_id, spec.lora, spec.train, *rows, start, until)
        return spec, self._engine.prepare(job, checkpoint), tokenizer
