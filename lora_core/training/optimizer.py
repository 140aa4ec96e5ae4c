"""One flat fp32 vector a job: A and B, their gradient, and AdamW's two moments.

The vector (`flat_adapter.py`) is the unit of everything that happens between steps: one optimizer call, one all-reduce,
one checkpoint blob. The gradient carries two more numbers at its end, the sum of token losses and the count of
supervised tokens, so that ranks agree on all three in one message.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load, save, save_file
from torch import Tensor

from lora_core.adapters.adapter import Adapter
from lora_core.config import TrainConfig
from lora_core.kernels.transfer import arrival, to_host
from lora_core.training.flat_adapter import FlatAdapter, HostAdapter

AllReduce = Callable[[Tensor], None]
"""Sums a tensor over all ranks in place."""

Broadcast = Callable[[Tensor], None]
"""Fills a tensor with rank 0's."""


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
class Evaluation:
    """The validation examples after `step` steps: mean loss of their supervised tokens, and the share of these that the
    model would have written (its most probable token is the label). Of pairs they are the figures of `PairFigures`,
    with `margin`.
    """

    step: int
    loss: float
    accuracy: float
    tokens: int
    margin: float | None = None


@dataclass(frozen=True)
class StepOutcome:
    """One optimizer step: mean loss per supervised token, their count over all ranks, and the gradient's norm before
    clipping; with the evaluation after it, where one was due. Of pairs the loss is the mean over these, with `accuracy`
    and `margin` as `PairFigures` has them.
    """

    loss: float
    tokens: int
    grad_norm: float
    evaluation: Evaluation | None = None
    accuracy: float | None = None
    margin: float | None = None

    @property
    def is_finite(self) -> bool:
        """Whether the job can go on from it."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class Snapshot:
    """A job's state at one moment, in host memory of its own. `arrived` waits until it is there."""

    tensors: dict[str, Tensor]
    counters: dict[str, float | int | str]
    arrived: Callable[[], object] = field(default=lambda: None, compare=False)

    def dump(self) -> bytes:
        """One safetensors blob, which `load` reads."""
        self.arrived()
        return save(self.tensors, self._header)

    def write(self, path: Path) -> None:
        """The same into a file, without another copy in memory, and without Python's lock while bytes are copied."""
        self.arrived()
        save_file(self.tensors, path, self._header)

    @property
    def _header(self) -> dict[str, str]:
        return {"counters": json.dumps(self.counters)}

    @classmethod
    def load(cls, blob: bytes) -> Snapshot:
        """What `dump` wrote."""
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        return cls(load(blob), json.loads(header["__metadata__"]["counters"]))


class HostState:
    """What training starts from, in host memory: vectors take their place on the device when there is room for them.

    `moments` None are zeros. With `pinned` memory the move is as fast as the bus.
    """

    def __init__(self, start: Adapter, dtype: torch.dtype = torch.float32, pinned: bool = False) -> None:
        """`start` holds the weights to begin with, which are copied; `dtype` is what the base computes in."""
        wide = torch.promote_types(dtype, torch.float32)
        self._pinned = pinned
        self.trained = HostAdapter(start, wide, pinned)
        self.residual = HostAdapter(start.residual, wide, pinned) if start.residual is not None else None
        self.moments: tuple[Tensor, Tensor] | None = None
        self.best: Tensor | None = None
        self.steps = 0
        if pinned:  # for the copies of a snapshot: torch keeps it, and to get it then would hold up training for 0.25 s
            _ = [torch.empty_like(self.trained.vector, pin_memory=True) for _ in range(2)]

    def restore(self, snapshot: Snapshot) -> None:
        """Start from there.

        Raises:
            ValueError: it is of an adapter with another number of parameters.
        """
        tensors, flat = snapshot.tensors, self.trained.vector
        if tensors["flat"].shape != flat.shape:
            raise ValueError(f"the checkpoint holds {tensors['flat'].numel()} parameters, this job has {flat.numel()}")
        flat.copy_(tensors["flat"])
        if self.residual is not None:
            self.residual.vector.copy_(tensors["residual"])
        # Copied too: AdamW may round another way where vectors do not begin as torch's do.
        first, second = (torch.empty(len(flat), dtype=flat.dtype, pin_memory=self._pinned) for _ in range(2))
        self.moments = first.copy_(tensors["exp_avg"]), second.copy_(tensors["exp_avg_sq"])
        self.best = tensors.get("best")
        self.steps = int(snapshot.counters["adam_steps"])


class NoGradientError(ValueError):
    """Some adapted modules take no part in the model's output, so that they would never learn."""


class FlatAdamW:
    """A, B and AdamW of one job, on one vector. `adapter` is what the bank computes with; its A and B are views."""

    def __init__(
        self, start: HostState, train: TrainConfig, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        """`start` is moved, and of no more use after it; `dtype` is what the base computes in."""
        self.train, self.steps = train, start.steps
        self._trained = FlatAdapter(start.trained, device, dtype)
        self._residual = FlatAdapter(start.residual, device, dtype) if start.residual is not None else None
        residual = self._residual.adapter if self._residual is not None else None
        self.adapter = replace(self._trained.adapter, residual=residual)
        self.flat = self._trained.vector
        self._message = self.flat.new_zeros(self.flat.numel() + 2)
        self._grad = self._message[:-2]
        for weight, grad in zip(self.adapter.trained, self._trained.layout.views(self._grad), strict=True):
            weight.requires_grad_().grad = grad  # the bank adds into it
        if start.moments is None:
            self.moments = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        else:
            self.moments = start.moments[0].to(device), start.moments[1].to(device)
        self._adamw = self._parameter_groups()
        self._best = start.best  # in host memory: it is written at evaluations and read once

    def _parameter_groups(self) -> torch.optim.AdamW:
        """AdamW of the slice of A and the slice of B and m, whose moments are slices of `moments`."""
        parts = self.flat[: self._trained.layout.size_a], self.flat[self._trained.layout.size_a :]
        adamw = torch.optim.AdamW(
            [{"params": [part]} for part in parts],
            lr=self.train.learning_rate,
            weight_decay=self.train.weight_decay,
            fused=True,
        )
        split = [self._trained.layout.size_a, self.flat.numel() - self._trained.layout.size_a]
        slices = (vector.split(split) for vector in (self._grad, *self.moments))
        for part, grad, exp_avg, exp_avg_sq in zip(parts, *slices, strict=True):
            part.grad = grad
            step = torch.full((), float(self.steps), device=part.device)
            adamw.state[part] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        return adamw

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(weight.numel() for weight in self.adapter.trained)

    def add_loss(self, loss_sum: Tensor, tokens: int) -> None:
        """Count a micro-batch: its summed loss (detached) and its supervised tokens, or pairs."""
        self._message[-2] += loss_sum
        self._message[-1] += tokens

    def queue_step(self, rate: float, all_reduce: AllReduce | None, check_gradients: bool = False) -> Tensor:
        """Reduce, divide by the step's supervised tokens (or pairs), clip, update, and clear the gradient, without
        waiting for the device unless it is to `check_gradients` (see `EngineJob.gradient_check_step`): `[3]`, what
        `outcome` reads.

        A loss or gradient that is not finite changes nothing: A, B and the moments stay as they were, and the outcome
        shows it. Neither does a step whose examples were all prompt.

        Raises:
            NoGradientError: some module had no gradient up to here; on every rank, as it is the reduced one.
        """
        if all_reduce is not None:
            all_reduce(self._message)
        if check_gradients:
            self._refuse_missing_gradient()
        loss_sum, tokens = self._message[-2:]
        norm = torch.linalg.vector_norm(self._grad)
        sums = torch.stack([loss_sum, tokens, norm])
        max_norm = self.train.max_grad_norm
        factor = tokens.reciprocal() if max_norm is None else torch.minimum(tokens.reciprocal(), max_norm / norm)
        self._grad.mul_(factor)
        # As torch's GradScaler tells it: the device then skips the update.
        self._adamw.found_inf = (~torch.isfinite(sums * factor).all()).float()  # type: ignore[attr-defined]
        group_a, group_b = self._adamw.param_groups
        group_a["lr"], group_b["lr"] = rate, rate * self.train.loraplus_lr_ratio
        self._adamw.step()
        self._refresh(self._trained)
        self._message.zero_()
        return sums

    def outcome(self, loss_sum: float, tokens: float, norm: float) -> StepOutcome:
        """What came of a queued step; it counts if it changed something."""
        if tokens == 0:
            return StepOutcome(loss=0.0, tokens=0, grad_norm=0.0)
        outcome = StepOutcome(loss=loss_sum / tokens, tokens=int(tokens), grad_norm=norm / tokens)
        self.steps += outcome.is_finite
        return outcome

    def _refresh(self, *changed: FlatAdapter) -> None:
        """What is made from A and B: their bf16 copy now, DoRA's norms at their next use."""
        for part in changed:
            if part.cast is not part.vector:
                part.cast.copy_(part.vector)
        self.adapter.norm.clear()

    def _refuse_missing_gradient(self) -> None:
        """Up to here every module must have had a gradient, in A or in B: of the two, one has none at first where the
        other is zero. A module without any would never learn. What was before this step is in the first moments.
        """
        weights = zip(*map(self._trained.layout.views, (self._grad, self.moments[0])), strict=True)
        nonzero = torch.stack([grad.any() | moment.any() for grad, moment in weights])
        had, count = nonzero.tolist(), len(self.adapter.a)
        of_modules = zip(self.adapter.a, had[:count], had[count : 2 * count], strict=True)
        without_gradient = [name for name, of_a, of_b in of_modules if not (of_a or of_b)]
        if without_gradient:
            self._message.zero_()
            raise NoGradientError(
                f"no gradient reaches {', '.join(without_gradient)}: this model does not use them; leave them out of"
                " target_modules"
            )

    def _state(self) -> dict[str, Tensor]:
        """PiSSA's residual counts: another machine may find other singular vectors."""
        state = {"flat": self.flat, "exp_avg": self.moments[0], "exp_avg_sq": self.moments[1]}
        return state if self._residual is None else state | {"residual": self._residual.vector}

    def synchronise(self, broadcast: Broadcast) -> None:
        """Go on from rank 0's numbers on every rank: machines may round PiSSA's singular vectors differently."""
        with torch.no_grad():
            for vector in self._state().values():
                broadcast(vector)
        self._refresh(*filter(None, (self._trained, self._residual)))

    def keep_best(self) -> None:
        """Remember what is trained as it is."""
        self._best = to_host(self.flat)

    def load_best(self) -> None:
        """Go back to what `keep_best` remembered."""
        assert self._best is not None
        with torch.no_grad():
            self.flat.copy_(self._best)
        self._refresh(self._trained)

    def snapshot(self, counters: dict[str, float | int | str], beside: Mapping[str, Tensor] | None = None) -> Snapshot:
        """All that `HostState.restore` needs to continue bit for bit, and what the caller has `beside` it, copied to
        host memory: steps may go on while it arrives there and is written.
        """
        copies = {name: to_host(tensor) for name, tensor in (self._state() | dict(beside or {})).items()}
        if self._best is not None:
            copies["best"] = self._best  # replaced by the next one, never written into
        return Snapshot(copies, {**counters, "adam_steps": self.steps}, arrival(self.flat.device))

    def on_host(self) -> Adapter:
        """A copy of what is trained as it is now, which arrives as that of `to_host` does."""
        residual = None if self._residual is None else self._residual.on_host()
        return replace(self._trained.on_host(), residual=residual)
