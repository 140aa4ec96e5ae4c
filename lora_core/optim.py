"""One flat fp32 vector a job: A and B, their gradient, and AdamW's two moments.

The vector is the unit of everything that happens between steps: one optimizer call, one all-reduce, one checkpoint
blob. A and B are views into it: all A in the model's order, then all B, so that each kind is one slice. Every tensor
starts at a multiple of 8 numbers, as vector loads want; what lies between stays zero. The gradient carries two more
numbers at its end, the sum of token losses and the count of supervised tokens, so that ranks agree on all three in one
message. Where the base computes in bf16, a bf16 copy of the vector is what products use; it is made anew after each
step. A base in fp64 makes all of it fp64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from safetensors.torch import load, save
from torch import Tensor

from lora_core.adapter_bank import Adapter
from lora_core.config import TrainConfig

MIN_TOKENS_TO_JUDGE = 16
"""A step of one or two tokens may rightly leave q and k without a gradient (a token that sees only itself)."""

ALIGNMENT = 8
"""Numbers: 16 bytes of bf16."""

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
        self, start: Adapter, train: TrainConfig, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        """`start` holds the weights to begin with, which are copied; `dtype` is what the base computes in."""
        self.train, self.steps = train, 0
        master = torch.promote_types(dtype, torch.float32)
        places_a, size_a = _places(start.a.values(), 0)
        places_b, size = _places(start.b.values(), size_a)
        self.flat = torch.zeros(size, device=device, dtype=master)
        for place, weight in zip((*places_a, *places_b), (*start.a.values(), *start.b.values()), strict=True):
            self.flat[place] = weight.detach().reshape(-1).to(device, master)
        self._cast = self.flat.to(dtype)  # the vector itself where the dtype is its own
        self._message = torch.zeros(size + 2, device=device, dtype=master)
        self._grad = self._message[:-2]
        a = {name: self._leaf(place, start.a[name]) for name, place in zip(start.a, places_a, strict=True)}
        b = {name: self._leaf(place, start.b[name]) for name, place in zip(start.b, places_b, strict=True)}
        cast = [
            self._cast[place].view(like.shape)
            for place, like in zip((*places_a, *places_b), (*a.values(), *b.values()), strict=True)
        ]
        pairs = zip(cast[: len(a)], cast[len(a) :], strict=True)
        self.adapter = replace(start, a=a, b=b, cast=dict(zip(a, pairs, strict=True)))
        self.moments = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self._adamw = self._optimizer(size_a)

    def _leaf(self, place: slice, like: Tensor) -> Tensor:
        """A leaf that shares the vector's memory; its .grad shares the message's, and the bank adds into it."""
        leaf = self.flat[place].view(like.shape).detach().requires_grad_()
        leaf.grad = self._grad[place].view(like.shape)
        return leaf

    def _optimizer(self, size_a: int) -> torch.optim.AdamW:
        """Two groups, the slice of A and that of B, whose moments are slices of `moments`."""
        groups = []
        states = {}
        for place in (slice(0, size_a), slice(size_a, None)):
            part = self.flat[place]
            part.grad = self._grad[place]
            groups.append({"params": [part]})
            exp_avg, exp_avg_sq = (moment[place] for moment in self.moments)
            states[part] = {
                "step": torch.zeros((), device=part.device),
                "exp_avg": exp_avg,
                "exp_avg_sq": exp_avg_sq,
            }
        adamw = torch.optim.AdamW(groups, lr=self.train.learning_rate, weight_decay=self.train.weight_decay, fused=True)
        adamw.state.update(states)
        return adamw

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(weight.numel() for weight in (*self.adapter.a.values(), *self.adapter.b.values()))

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
        if self.steps == 0 and tokens >= MIN_TOKENS_TO_JUDGE:
            self._refuse_missing_gradient()
        self._grad.div_(tokens)
        norm = float(torch.linalg.vector_norm(self._grad))
        if math.isfinite(norm) and math.isfinite(loss_sum):
            if norm > self.train.max_grad_norm:
                self._grad.mul_(self.train.max_grad_norm / norm)
            for group in self._adamw.param_groups:
                group["lr"] = rate
            self._adamw.step()
            self.steps += 1
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
        tensors = {"flat": self.flat, "exp_avg": self.moments[0], "exp_avg_sq": self.moments[1]}
        counters = {**counters, "adam_steps": self.steps}
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
            for own, saved in zip((self.flat, *self.moments), ("flat", "exp_avg", "exp_avg_sq"), strict=True):
                own.copy_(tensors[saved])
            self._update_cast()
        self.steps = int(counters["adam_steps"])
        for state in self._adamw.state.values():
            state["step"].fill_(self.steps)
        return counters


def _places(tensors: Iterable[Tensor], start: int) -> tuple[list[slice], int]:
    """Where each tensor lies in a vector from `start` on, and where the next one may."""
    places = []
    for tensor in tensors:
        places.append(slice(start, start + tensor.numel()))
        start += -(-tensor.numel() // ALIGNMENT) * ALIGNMENT
    return places, start
