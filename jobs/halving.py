"""Which trials of a sweep go on from a rung: those of the lowest validation loss (`jobs/sweep.py` says how many). Pure.

A rung is decided once every trial that has not ended waits there: which trials go on depends on their losses alone, not
on when and where each was trained. Of equal ones the first goes on; a trial that failed or was cancelled is not there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.sweep import Sweep
from jobs.trials import Trial, place_text


@dataclass(frozen=True)
class Decision:
    """The trials at a rung, the best first, of which `going` go on, each until after so many steps it comes to
    `next_rung` (None: it is the only one, and goes to its end).
    """

    rung: int
    trials: tuple[Trial, ...]
    going: int
    next_rung: int | None
    until_steps: tuple[int | None, ...]

    def message(self) -> str:
        """Say it of the sweep."""
        best = self.trials[0]
        others = f"{self.going} of {len(self.trials)} trials go on" if self.next_rung else "it alone goes on"
        return f"rung {self.rung}: {best} is best, with a validation loss of {best.loss:.4f}; {others}"

    def message_of(self, place: int) -> str:
        """Say it of the trial that came to this place, the first being 1."""
        verb = "went on from" if place <= self.going else "stopped at"
        loss = self.trials[place - 1].loss
        return f"{verb} rung {self.rung}: validation loss {loss:.4f}, {place_text(place, len(self.trials))}"


def decide(sweep: Sweep, trials: Sequence[Trial]) -> Decision | None:
    """Return what becomes of the trials of a sweep, all of which are given; None: nothing yet."""
    there = [trial for trial in trials if not trial.ended]
    if not there or not all(trial.waits for trial in there):
        return None
    rung = there[0].reached
    assert all(trial.reached == rung for trial in there)
    rungs = sweep.rungs_of(len(trials), min(trial.steps for trial in trials))
    ordered = sorted(there, key=lambda trial: (_comparable(trial.loss), trial.number))
    going = min(len(ordered), sweep.left_after(rung, rungs, len(trials)))
    following = rung + 1 if going > 1 else None
    until = [None if following is None else sweep.step_of(following, rungs, one.steps) for one in ordered[:going]]
    return Decision(rung, tuple(ordered), going, following, tuple(until))


def _comparable(loss: float | None) -> float:
    return math.inf if loss is None or math.isnan(loss) else loss
