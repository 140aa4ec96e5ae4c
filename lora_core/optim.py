"""One flat fp32 vector a job: A and B, their gradient, and AdamW's two moments.

The vector is the unit of everything that happens between steps: one optimizer call, one all-reduce, one checkpoint
blob. A and B are views into it. The gradient carries two more numbers at its end, the sum of token losses and the count
of supervised tokens, so that ranks agree on all three in one message. Where the base computes in bf16, a bf16 copy of
the vector is what products use; it is made anew after each step. A base in fp64 makes all of it fp64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from torch import Tensor

from lora_core.adapter_bank import Adapter, init_adapter
from lora_core.config import LoraConfig, TrainConfig

MIN_TOKENS_TO_JUDGE = 16
"""A step of one or two tokens may rightly leave q and k without a gradient (a token that sees only itself)."""

AllReduce = Callable[[Tensor], None]
"""Sums a tensor over all ranks in place."""


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then constant, linear to zero or cosine to
    zero.
    """
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if config.lr_scheduler == "linear":
        return config.learning_rate * (1.0 - progress)
    if config.lr_scheduler == "cosine":
        return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate


@dataclass(frozen=True)
class StepOutcome:
    """One optimizer step: mean loss per supervised token, their count over all ranks, and the gradient's norm before
    clipping.
    """

    loss: float
    tokens: int
    grad_norm: float


class NoGradientError(ValueError):
    """Some adapted modules take no part in the model's output, so that they would never learn."""


class FlatAdamW:
    """A, B and AdamW of one job, on one vector. `adapter` is what the bank computes with; its A and B are views."""

    def __init__(
        self,
        shapes: dict[str, tuple[int, int]],
        lora: LoraConfig,
        train: TrainConfig,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`shapes` are (in, out) of each adapted module; `dtype` is what the base computes in."""
        self.train = train
        weights = init_adapter(shapes, lora, train.seed)
        master = torch.promote_types(dtype, torch.float32)
        self.flat = torch.cat([tensor.reshape(-1) for pair in weights.values() for tensor in pair]).to(device, master)
        self._cast = self.flat.to(dtype)  # the vector itself where the dtype is its own
        self._message = torch.zeros(self.flat.numel() + 2, device=device, dtype=master)
        self._grad = self._message[:-2]
        a: dict[str, Tensor] = {}
        b: dict[str, Tensor] = {}
        cast: dict[str, list[Tensor]] = {name: [] for name in weights}
        offset = 0
        for name, pair in weights.items():
            for target, like in zip((a, b), pair, strict=True):
                place = slice(offset, offset + like.numel())
                # A leaf that shares the vector's memory; its .grad shares the message's, and the bank adds into it.
                target[name] = self.flat[place].view(like.shape).detach().requires_grad_()
                target[name].grad = self._grad[place].view(like.shape)
                cast[name].append(self._cast[place].view(like.shape))
                offset += like.numel()
        self.adapter = Adapter(
            scale=lora.scale,
            a=a,
            b=b,
            dropout=lora.lora_dropout,
            cast={name: (pair[0], pair[1]) for name, pair in cast.items()},
        )
        self.flat.grad = self._grad
        self._adamw = torch.optim.AdamW(
            [self.flat], lr=train.learning_rate, weight_decay=train.weight_decay, fused=True
        )

    def add_loss(self, loss_sum: Tensor, tokens: int) -> None:
        """Count a micro-batch: its summed loss (detached) and its supervised tokens."""
        self._message[-2] += loss_sum
        self._message[-1] += tokens

    def step(self, rate: float, all_reduce: AllReduce | None) -> StepOutcome:
        """Reduce, divide by the step's supervised tokens, clip, update, and clear the gradient.

        A loss or gradient that is not finite changes nothing: A, B and the moments stay as they were, and the outcome
        shows it.

        Raises:
            NoGradientError: on the first step, some B has no gradient; on every rank, as it is the reduced one.
        """
        if all_reduce is not None:
            all_reduce(self._message)
        loss_sum, tokens = self._message[-2:].tolist()
        if tokens == 0:  # every example of the step was all prompt; there is nothing to learn from it
            self._message.zero_()
            return StepOutcome(loss=0.0, tokens=0, grad_norm=0.0)
        if not self._adamw.state and tokens >= MIN_TOKENS_TO_JUDGE:
            self._refuse_missing_gradient()
        self._grad.div_(tokens)
        norm = float(torch.linalg.vector_norm(self._grad))
        if math.isfinite(norm) and math.isfinite(loss_sum):
            if norm > self.train.max_grad_norm:
                self._grad.mul_(self.train.max_grad_norm / norm)
            self._adamw.param_groups[0]["lr"] = rate
            self._adamw.step()
            self._update_cast()
        outcome = StepOutcome(loss=loss_sum / tokens, tokens=int(tokens), grad_norm=norm)
        self._message.zero_()
        return outcome

    def _update_cast(self) -> None:
        if self._cast is not self.flat:
            self._cast.copy_(self.flat)

    def _refuse_missing_gradient(self) -> None:
        """On the first step every B must have a gradient (A has none yet, since B is zero); without one it would never
        learn.
        """
        silent = [name for name, b in self.adapter.b.items() if b.grad is None or not bool(b.grad.any())]
        if silent:
            self._message.zero_()
            raise NoGradientError(
                f"no gradient reaches {', '.join(silent)}: this model does not use them; leave them out of"
                " target_modules"
            )

    def dump(self, counters: dict[str, float | int | str]) -> bytes:
        """One safetensors blob from which `restore` continues bit for bit."""
        state = self._adamw.state.get(self.flat)
        tensors = {"flat": self.flat}
        if state:
            tensors |= {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            counters = {**counters, "adam_steps": int(state["step"])}
        return save(
            {name: tensor.detach().cpu() for name, tensor in tensors.items()}, {"counters": json.dumps(counters)}
        )

    def restore(self, blob: bytes) -> dict[str, float | int | str]:
        """Continue from `dump`; returns its counters.

        Raises:
            ValueError: the blob is of an adapter with another number of parameters.
        """
        tensors = load(blob)
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        counters: dict[str, float | int | str] = json.loads(header["__metadata__"]["counters"])
        if tensors["flat"].shape != self.flat.shape:
            raise ValueError(
                f"the checkpoint holds {tensors['flat'].numel()} parameters, this job has {self.flat.numel()}"
            )
        with torch.no_grad():
            self.flat.copy_(tensors["flat"])
            self._update_cast()
        if "exp_avg" in tensors:
            self._adamw.state[self.flat] = {
                "step": torch.tensor(float(counters["adam_steps"]), device=self.flat.device),
                "exp_avg": tensors["exp_avg"].to(self.flat.device),
                "exp_avg_sq": tensors["exp_avg_sq"].to(self.flat.device),
            }
        return counters
