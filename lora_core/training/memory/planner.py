"""What a micro-batch may be on one device: its tokens, and what of it is recomputed so that it fits into memory."""

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

UNDERESTIMATED = {"nf4": 0.045}
"""By so much of the memory predictions are too low: it was seen on an H100 (`tests/bench/memory_gpu.py`)."""


class MemoryPlanner:
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
            self.budget = int(given * (1 - UNDERESTIMATED.get(base.precision, 0.0)))
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
        references = [job.lora for job in jobs if job.has_reference_adapter]
        return self.predictor.fit(self.budget, [job.lora for job in jobs], longest, smallest, kept, references)

    def prefetch_plans(self, jobs: Sequence[EngineJob]) -> None:
        """Make the plans that `fit` will ask for if all of these jobs come together or one leaves, as their dry runs
        would hold up training for seconds.
        """
        if self.budget is None:
            return
        with suppress(DoesNotFitError):
            self.plan(jobs)
        shapes = Counter(self.predictor.shapes.of(job.lora) for job in jobs)
        for leaving in jobs:
            if shapes[self.predictor.shapes.of(leaving.lora)] == 1:
                with suppress(DoesNotFitError):
                    self.plan([job for job in jobs if job is not leaving])

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
