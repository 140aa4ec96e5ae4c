"""What a micro-batch may be on one device: its rows, and what of it is computed twice so that it fits into memory."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from lora_core.models.base import BaseModel
from lora_core.models.forward import ForwardPath
from lora_core.models.llama.decoder import Checkpointing
from lora_core.training.job import EngineJob
from lora_core.training.memory.predictor import (
    DoesNotFitError,
    Plan,
    available_bytes,
    keep_freed_memory,
    predictor,
    return_freed_memory,
)

log = logging.getLogger("lora.engine")

LEFT_FREE = {"nf4": 0.045}
"""Of the memory, where predictions are too low: so much more was taken on an H100 (`tests/bench/memory_gpu.py`)."""


class Room:
    """`capacity` and `checkpointing`, as given; or, where `capacity` is None, chosen for the jobs that are to train so
    that on this path they fit into `budget_bytes` (None: what this machine can give now).
    """

    def __init__(
        self,
        base: BaseModel,
        path: ForwardPath,
        capacity: int | None,
        checkpointing: Checkpointing,
        budget_bytes: int | None,
    ) -> None:
        self.capacity, self.checkpointing = capacity or 0, checkpointing
        self.budget: int | None = None
        self._device = base.device.type
        if not capacity:
            given = budget_bytes or available_bytes(base.device)
            self.budget = int(given * (1 - LEFT_FREE.get(base.precision, 0.0)))
            quantised = base.precision if base.is_quantised else None
            self.predictor = predictor(base.model.config, base.model.dtype, path, self._device, quantised)

    def plan(self, jobs: Sequence[EngineJob]) -> Plan | None:
        """Capacity and checkpointing for these jobs, if they are to be chosen.

        Raises:
            DoesNotFitError: there is not enough memory for them.
        """
        if self.budget is None or not jobs:
            return None
        longest, smallest = max(job.longest for job in jobs), max(job.largest_chunk for job in jobs)
        kept = [job.lora for job in jobs if job.train.keeps_best]
        return self.predictor.fit(self.budget, [job.lora for job in jobs], longest, smallest, kept)

    def plan_ahead(self, jobs: Sequence[EngineJob]) -> None:
        """Make the dry runs that `fit` will ask for: without them those would hold up training for seconds. So all of
        these jobs come together, or one leaves.
        """
        if self.budget is None:
            return
        with suppress(DoesNotFitError):
            self.plan(jobs)
        kinds = Counter(self.predictor.footprints.of(job.lora) for job in jobs)
        for leaver in jobs:
            if kinds[self.predictor.footprints.of(leaver.lora)] == 1:
                with suppress(DoesNotFitError):
                    self.plan([job for job in jobs if job is not leaver])

    def fit(self, jobs: Sequence[EngineJob]) -> None:
        """Choose for these jobs from now on. Raises as `plan` does, and nothing changes."""
        plan = self.plan(jobs)
        if plan is None or self.budget is None:
            return
        self.capacity, self.checkpointing = plan.capacity, plan.checkpointing
        if self._device == "cpu":
            (return_freed_memory if plan.exact_heap else keep_freed_memory)()
        log.info(
            "event=planned jobs=%d capacity=%d checkpointing=%s predicted=%.2fGB budget=%.2fGB",
            len(jobs),
            plan.capacity,
            plan.checkpointing,
            plan.predicted_bytes / 1e9,
            self.budget / 1e9,
        )
