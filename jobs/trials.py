"""The trials of a sweep: jobs with the options of one, which wait for each other at rungs (`sweep.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jobs.job import TERMINAL, JobProgress, JobStatus
from jobs.spec import JobSpec
from jobs.sweep import parameters_text


@dataclass(frozen=True, kw_only=True)
class NewTrial:
    """A trial that was checked: its values, and how many steps it has, of about so many tokens each."""

    parameters: dict[str, Any]
    spec: JobSpec
    forward_path: str
    steps: int
    step_tokens: int


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial as it was read, beside the state of its job. After `until_step` it comes to `rung` (None: it is the
    only one left, and trains to its end). `loss` is the validation loss with which it came to the rung `reached`, 0
    before the first; once that is decided, it was the `place`-th of `compared` there.
    """

    sweep_id: str
    number: int
    job_id: str
    parameters: dict[str, Any]
    steps: int
    rung: int | None
    until_step: int | None
    reached: int
    loss: float | None
    place: int | None
    compared: int | None
    status: JobStatus
    attempt: int
    error: str | None
    progress: JobProgress | None

    def __str__(self) -> str:
        return f"trial {self.number} ({parameters_text(self.parameters)})"

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.status in TERMINAL

    @property
    def waits(self) -> bool:
        """Whether it is at its rung, and waits for the others."""
        return self.status is JobStatus.PAUSED and self.reached == self.rung

    @property
    def validation_loss(self) -> float | None:
        """The last that is known."""
        return self.progress.get("validation_loss", self.loss) if self.progress else self.loss

    @property
    def standing(self) -> str:
        """Say how it stands among the others."""
        if self.waits:
            return f"waits at rung {self.reached}"
        if not self.reached or self.place is None:
            return self.error or ""
        verb = "stopped at" if self.status is JobStatus.CANCELLED else "went on from"
        return f"{verb} rung {self.reached}, {place_text(self.place, self.compared or 0)}"


def place_text(place: int, compared: int) -> str:
    """Write `4th of 8`."""
    ending = "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending} of {compared}"
