"""Frozen weights once more as oneDNN packs them, by which a CPU serves.

MKL's product of a few rows brings the weights into its own order each time, and reads them at a third of the memory's
speed; oneDNN's reads them as they were packed once. What it costs is memory: the copy belongs to this process, where
the weights are pages of a file that processes share. Nothing reads those pages then but training beside it, and the
system may drop them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from lora_core.models.host_memory import free_host_bytes
from lora_core.models.precision import DenseWeight

log = logging.getLogger("lora.engine")

PACKED_SHARE = 0.5
"""Of the memory that is free, for the copy at most."""


def pack_for_serving(weights: Sequence[DenseWeight], dtype: torch.dtype) -> None:
    """Pack all of them where oneDNN multiplies this dtype here and there is room for a copy; say what was done."""
    if not _is_packable(dtype):
        return
    nbytes, free = sum(weight.nbytes for weight in weights), free_host_bytes()
    if nbytes > PACKED_SHARE * free:
        log.warning(
            "event=serving_unpacked reason=memory copy_bytes=%d free_bytes=%d advice='give the replica room for a copy"
            " of the weights to serve faster'",
            nbytes, free,
        )  # fmt: skip
        return
    log.info("event=serving_packed copy_bytes=%d", sum(weight.pack() for weight in weights))


def _is_packable(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
