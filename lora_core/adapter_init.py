"""What an adapter is before its first step: which modules it has, and A, B and scale of each."""

from __future__ import annotations

import torch

from lora_core.adapter_bank import Adapter, AdapterBank, key_of
from lora_core.config import LoraConfig


def init_adapter(bank: AdapterBank, lora: LoraConfig, seed: int) -> Adapter:
    """A fresh adapter, without gradients: A uniform in +-1/sqrt(in) as PEFT's default, B zero.

    The random stream depends on the seed and the module's name alone, so that every rank, and every choice of other
    target modules, starts from the same numbers.
    """
    adapter = Adapter(scale={}, a={}, b={}, dropout=lora.lora_dropout)
    for name, (fan_in, fan_out) in bank.shapes(lora.target_modules).items():
        rank, stream = lora.rank_of(name), torch.Generator().manual_seed(key_of(f"{seed}:{name}") & (2**63 - 1))
        adapter.a[name] = torch.empty(rank, fan_in).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=stream)
        adapter.b[name] = torch.zeros(fan_out, rank)
        adapter.scale[name] = lora.scale_of(name)
    return adapter
