"""Trials of sweeps in SQL: beside the row of each in `jobs`, where it stands among the others.

A sweep has a row of its own in `jobs`, which no scheduler starts: while it waits it is held for ever, and while its
trials run it has its own id for a session, as a job that runs has one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from jobs.halving import Decision
from jobs.job import TERMINAL, Job, JobStatus
from jobs.spec import JobSpec
from jobs.store.pages import job_of
from jobs.store.schema import jobs, trials
from jobs.store.sessions import SessionTable
from jobs.trials import NewTrial, Trial

IS_SWEEP = jobs.c.sweep_id == jobs.c.id
HELD = {"not_before": math.inf}


class TrialTable(SessionTable):
    """The part of the queue that reads where trials stand."""

    def trials(self, sweep_ids: Collection[str]) -> Mapping[str, Sequence[Trial]]:
        """Return the trials of these sweeps, in their order."""
        if not sweep_ids:
            return {}
        with self._db.read() as conn:
            return _trials(conn, trials.c.sweep_id.in_(list(sweep_ids)))

    def trial(self, job: Job) -> Trial | None:
        """Return what a job is in its sweep, if it is a trial of one."""
        if job.sweep_id in (None, job.id):
            return None
        with self._db.read() as conn:
            ((found,),) = _trials(conn, trials.c.job_id == job.id).values()
        return found

    def open_sweeps(self, cluster: str) -> Sequence[tuple[Job, Sequence[Trial]]]:
        """Return the sweeps of a cluster that wait or run, with their trials."""
        with self._db.read() as conn:
            found = [job_of(row) for row in conn.execute(_OPEN)]
            mine = [one for one in found if one.cluster == cluster and one.status is not JobStatus.PAUSED]
            of_sweeps = _trials(conn, trials.c.sweep_id.in_([one.id for one in mine])) if mine else {}
        return [(one, of_sweeps[one.id]) for one in mine]


# By the index of just these rows: a cluster's, which have others, are told apart afterwards.
_OPEN = sa.select(jobs).where(IS_SWEEP, jobs.c.finished_at.is_(None)).order_by(jobs.c.id)


def _trials(conn: sa.Connection, those: sa.ColumnElement[bool]) -> dict[str, list[Trial]]:
    columns = jobs.c.status, jobs.c.attempt, jobs.c.error, jobs.c.progress
    query = sa.select(trials, *columns).join(jobs, jobs.c.id == trials.c.job_id).where(those)
    found: dict[str, list[Trial]] = {}
    for row in conn.execute(query.order_by(trials.c.sweep_id, trials.c.number)).mappings():
        trial = Trial(**dict(row) | {"status": JobStatus(row["status"])})
        found.setdefault(trial.sweep_id, []).append(trial)
    return found


def add_trials(conn: sa.Connection, sweep: Mapping[str, Any], spec: JobSpec, new: Sequence[NewTrial]) -> list[str]:
    """Insert the trials of a sweep, whose row this is; returns the ids of their jobs, none of another job."""
    if spec.sweep is None:
        return []
    rungs = spec.sweep.rungs_of(len(new), min(trial.steps for trial in new))
    of_jobs, of_trials = [], []
    for number, trial in enumerate(new, 1):
        # Not by its content: who asks for the same is to have a job that is trained to its end.
        own = {"id": f"{sweep['id']}-{number}", "content_key": f"{sweep['content_key']}-{number}", "copy": sweep["id"]}
        own |= {"spec_json": trial.spec.canonical_json(), "forward_path": trial.forward_path}
        own |= {"step_tokens": trial.step_tokens, "client_request": None, "idempotency_key": None}
        of_jobs.append({**sweep, **own})
        alone = len(new) == 1
        of_trials.append(
            {
                "job_id": own["id"],
                "sweep_id": sweep["id"],
                "number": number,
                "parameters": trial.parameters,
                "steps": trial.steps,
                "rung": None if alone else 1,
                "until_step": None if alone else spec.sweep.step_of(1, rungs, trial.steps),
                "reached": 0,
            }
        )
    conn.execute(sa.insert(jobs), of_jobs)
    conn.execute(sa.insert(trials), of_trials)
    return [row["id"] for row in of_jobs]


def unfinished_trials(conn: sa.Connection, job: Job, *, at_rungs: bool = True) -> list[Job]:
    """Return the jobs of a sweep's trials that have not ended, locked, perhaps without those that wait at a rung; of
    another job none.
    """
    if not job.is_sweep:
        return []
    mine = jobs.c.sweep_id == job.id, jobs.c.id != job.id, jobs.c.status.not_in(sorted(TERMINAL))
    query = sa.select(jobs).where(*mine)
    if not at_rungs:
        waits = sa.select(trials.c.job_id).where(trials.c.job_id == jobs.c.id, trials.c.reached == trials.c.rung)
        query = query.where(~waits.exists())
    return [job_of(row) for row in conn.execute(query.order_by(jobs.c.id).with_for_update())]


def come_to_rung(conn: sa.Connection, job_id: str, loss: float) -> None:
    """Record the validation loss with which a trial has come to its rung."""
    values = {"reached": trials.c.rung, "loss": loss, "place": None, "compared": None}
    conn.execute(sa.update(trials).where(trials.c.job_id == job_id, trials.c.rung.is_not(None)).values(values))


def place_trials(conn: sa.Connection, decision: Decision) -> None:
    """Record how trials came out at a rung, and to which those come next that go on."""
    for place, trial in enumerate(decision.trials, 1):
        values: dict[str, int | None] = {"place": place, "compared": len(decision.trials)}
        if place <= decision.going:
            values |= {"rung": decision.next_rung, "until_step": decision.until_steps[place - 1]}
        conn.execute(sa.update(trials).where(trials.c.job_id == trial.job_id).values(values))
