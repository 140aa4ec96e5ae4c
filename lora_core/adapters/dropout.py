"""Which features of a linear's input an adapter's dropout drops: a function of keys, wherever the row is computed."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from lora_core.config import FINEST_DROPOUT


def dropout_mask(features: int, p: float, row_keys: Tensor, module_key: int) -> Tensor:
    """Make a mask `[rows, features]`, False with probability p: a function of (row key, module, feature) alone.

    So it does not depend on neighbours, packing, recomputation or resume. Bits come from splitmix64's finaliser
    (Steele, Lea and Flood 2014) over int64, which wraps around alike on CPU and GPU; four features share one number, 16
    bits each.
    """
    blocks = torch.arange(-(-features // 4), device=row_keys.device, dtype=torch.int64)
    bits = mix64(mix64(row_keys ^ module_key)[:, None] + blocks * _as_int64(0x9E3779B97F4A7C15))
    return bits.view(torch.int16)[:, :features] >= threshold(p) - 2**15


def threshold(p: float) -> int:
    """Return p as the mask has it, in units of `FINEST_DROPOUT`: 16 bits below it drop a feature."""
    return int(p / FINEST_DROPOUT)


def keep_probability(p: float) -> float:
    """Return the probability that a feature is kept."""
    return 1.0 - threshold(p) * FINEST_DROPOUT


def mix64(z: Tensor) -> Tensor:
    """Apply splitmix64's finaliser to int64 tensors; the shifts are logical."""
    z = z ^ ((z >> 30) & 0x3FFFFFFFF)
    z *= _as_int64(0xBF58476D1CE4E5B9)
    z ^= (z >> 27).bitwise_and_(0x1FFFFFFFFF)
    z *= _as_int64(0x94D049BB133111EB)
    z ^= (z >> 31).bitwise_and_(0x1FFFFFFFF)
    return z


def _as_int64(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def key_of(text: str) -> int:
    """Return 64 bits that stand for a text on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
