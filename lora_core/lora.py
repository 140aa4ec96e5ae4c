"""LoRA on one screen: the layer, the wrapped linear, and the recursive replacement, as Raschka's tutorial defines them.

    y = x W^T + b + alpha * (x A) B          A [in, r], B [r, out]

The names and shapes are the tutorial's ("Build a Large Language Model (From Scratch)", appendix E). What differs:

* **Initialisation.** The tutorial calls `kaiming_uniform_` on A stored as `[in, r]`, which takes its fan-in from `r`
  and makes A `sqrt(in / r)` too large (16 times at in = 4096, r = 16). Here the bound is `1 / sqrt(in)`, as in PEFT.
* **Precision.** A and B are fp32; on a bf16 base they are cast down for the product, never its input up.
* **Scale.** The tutorial multiplies by `alpha`, PEFT by `lora_alpha / r`. The tutorial's form is kept: `alpha` here
  equals PEFT's `lora_alpha / r`, so what was trained with `alpha` goes on in PEFT with `lora_alpha = alpha * r`.

This file is the definition that everything faster is tested against. The service trains through `models/hooks/bank.py`,
where many adapters share one base; one step of both is the same (`tests/core/test_lora.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LoRALayer(nn.Module):
    """The low-rank update `alpha * (x @ A @ B)`: x `[..., in_dim]` -> `[..., out_dim]`. Zero at the start, since B is
    zero.
    """

    def __init__(self, in_dim: int, out_dim: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(in_dim, rank).uniform_(-(in_dim**-0.5), in_dim**-0.5))
        self.B = nn.Parameter(torch.zeros(rank, out_dim))
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.alpha * (x @ self.A.to(x.dtype) @ self.B.to(x.dtype))
        return update


class LinearWithLoRA(nn.Module):
    """A linear `[..., in] -> [..., out]` plus its low-rank update."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear
        self.lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha).to(linear.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(x) + self.lora(x)
        return output


def replace_linear_with_lora(
    model: nn.Module, rank: int, alpha: float, target_modules: Sequence[str] | None = None
) -> list[str]:
    """Freeze `model` and wrap its linears in place; returns the names of the wrapped modules.

    `target_modules` holds names that equal a module's full name or its last parts; None wraps every `nn.Linear`.

    Raises:
        ValueError: nothing matches; the sentence names the linears that exist.
    """
    linears = [(name, module) for name, module in model.named_modules() if name and isinstance(module, nn.Linear)]
    wanted = [
        (name, module)
        for name, module in linears
        if target_modules is None or any(name == t or name.endswith("." + t) for t in target_modules)
    ]
    if not wanted:
        names = ", ".join(sorted({name.rpartition(".")[2] for name, _ in linears})) or "none"
        raise ValueError(
            f"target_modules {list(target_modules or [])} matches no linear; the linears here are: {names}"
        )
    model.requires_grad_(False)
    for name, module in wanted:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LinearWithLoRA(module, rank, alpha))
    return [name for name, _ in wanted]
