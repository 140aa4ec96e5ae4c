"""The driver of one session: one Ray Train run of N ranks on one frozen base, and whatever jobs it is given.

The main thread is inside `SessionTrainer.fit()`, where a SIGINT ends the run cleanly. A second thread controls the
session: see `controller.py`.
"""

from __future__ import annotations

import gc
import logging
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from cluster.ray_runtime import log_to_stderr
from cluster.settings import Settings
from jobs.job import SessionState
from jobs.session.controller import SessionController
from jobs.session.trainer import SessionTrainer
from jobs.store.jobs import JobQueue

log = logging.getLogger("lora.session")

RESTARTS = 2  # of the worker group, after a rank died
RANK_ENVIRONMENT = {
    "LORA_DATABASE_URL": "",
    # Two threads that spin on shared cores were seen to take 30 s a step, against 7 s when they sleep.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Ray trains on a thread, whose own arena would not keep what tensors free (`keep_freed_memory`).
    "MALLOC_ARENA_MAX": "1",
}


def run_session(settings: Settings, session_id: str, fence: int) -> int:
    """Drive one session to its end; returns the exit code."""
    queue = JobQueue(settings.database_url)
    session = queue.session(session_id)
    if session is None or not queue.session_move(
        session_id, SessionState.LAUNCHING, SessionState.RUNNING, reason="driver started", fence=fence
    ):
        log.error("session=%s event=not_ours fence=%d", session_id, fence)
        return 1
    if session.requested is not None:
        reason = session.reason or "asked to stop before it was up"
        queue.session_move(session_id, SessionState.RUNNING, SessionState.ENDED, reason=reason, fence=fence)
        return 0
    controller = SessionController(settings, queue, session_id, fence)
    # Set, it also says that GPU nodes will come, which an autoscaled cluster may not have up yet.
    gpus = "gpus_per_rank" in settings.model_fields_set or ray.cluster_resources().get("GPU", 0) > 0
    trainer = SessionTrainer(
        _train_loop,
        train_loop_config={
            # Ranks have no use for the database, and what they do not know they cannot leak.
            "settings": settings.model_copy(update={"database_url": ""}),
            "mailbox": controller.mailbox,
            "base_model": session.base_model,
            "precision": session.precision,
            "forward_path": session.forward_path,
            "on_gpus": gpus,
        },
        scaling_config=ScalingConfig(
            num_workers=session.num_workers,
            use_gpu=gpus,
            resources_per_worker={"CPU": 1, "GPU": settings.gpus_per_rank} if gpus else {"CPU": 1},
        ),
        run_config=RunConfig(
            name=session.ray_submission_id,
            storage_path=settings.train_storage_path,
            failure_config=FailureConfig(max_failures=RESTARTS),
            worker_runtime_env={"env_vars": RANK_ENVIRONMENT},  # type: ignore[call-arg]  # mypy sees V1's
        ),
    )
    controller.start()
    reason = "ended"
    try:
        trainer.fit()
    except TrainingFailedError as error:
        reason = _root_cause(error)
    finally:
        controller.stop()
    for state in (SessionState.RUNNING, SessionState.STOPPING):
        queue.session_move(session_id, state, SessionState.ENDED, reason=reason, fence=fence)
    log.info("session=%s event=ended reason=%s", session_id, reason)
    return 0 if reason == "ended" else 1


def _root_cause(error: TrainingFailedError) -> str:
    """Return the rank that died rather than the neighbours that noticed, in one line."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    died = {rank: failure for rank, failure in failures.items() if "PeerLostError" not in str(failure)} or failures
    if not died:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    rank, failure = min(died.items())
    return f"rank {rank}: {str(failure).strip().splitlines()[-1]}"


def _train_loop(config: dict[str, Any]) -> None:
    """Run one rank. Imported there: the driver and Ray's controller need no transformers, which takes 0.2 GB each."""
    log_to_stderr(config["settings"].log_format)
    log.info("rank=%d event=started", ray.train.get_context().get_world_rank())
    gc.disable()  # while libraries are imported there is no garbage, and looking for it takes a tenth of the 10 s
    from jobs.session.rank import train_loop

    gc.enable()
    train_loop(config)
