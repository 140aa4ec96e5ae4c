"""What an error that a rank met comes to."""

from __future__ import annotations

import torch

from cluster.storage.base import StorageCorrupt, StorageNotFound, StorageUnavailable
from jobs.job import FailureCode
from lora_core.training.job import JobDiverged
from lora_core.training.memory.predictor import DoesNotFitError

_CODES: dict[FailureCode, tuple[type[BaseException], ...]] = {
    FailureCode.OUT_OF_MEMORY: (MemoryError, torch.OutOfMemoryError, DoesNotFitError),
    FailureCode.DIVERGED: (JobDiverged,),
    FailureCode.DATA: (StorageNotFound, StorageCorrupt),
    FailureCode.STORAGE: (StorageUnavailable,),
}


def failure_code(error: BaseException) -> FailureCode:
    """Return what kind of failure it is, by its class."""
    return next((code for code, classes in _CODES.items() if isinstance(error, classes)), FailureCode.UNKNOWN)
