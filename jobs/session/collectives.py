"""How the ranks of a session stay in step: what they add up, gather and agree on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import ray.train
import torch
import torch.distributed as dist

T = TypeVar("T")


PATIENCE = timedelta(minutes=30)  # of a rank with another that does not come to a collective


class PeerLostError(RuntimeError):
    """A collective failed because another rank is gone; that rank's end is the cause, not this."""


class Collectives:
    """This rank's index among the ranks of a Ray Train run, and what they do together; all of them call each method at
    the same point.

    Raises:
        PeerLostError: from every method, when another rank is gone.
    """

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.ranks = context.get_world_rank(), context.get_world_size()
        self.local_ranks = context.get_local_world_size()
        # Control messages go through gloo on GPU too: they are small Python objects, and NCCL would stall the stream.
        self._control = dist.new_group(backend="gloo")

    @property
    def backend(self) -> str:
        """What carries tensors."""
        return str(dist.get_backend())

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Make it the sum over all ranks."""
        _run(lambda: dist.all_reduce(tensor))

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Make it rank 0's."""
        _run(lambda: dist.broadcast(tensor, src=0))

    def agree(self, ask: Callable[[], T]) -> T:
        """Return rank 0's answer on every rank. Ranks that each asked would leave at different steps and hang."""
        answer: list[T | None] = [ask() if self.rank == 0 else None]
        _run(lambda: dist.broadcast_object_list(answer, src=0, group=self._control))
        assert answer[0] is not None
        return answer[0]

    def gather(self, value: str | None) -> list[str | None]:
        """Return every rank's value on every rank."""
        values: list[str | None] = [value] * self.ranks
        _run(lambda: dist.all_gather_object(values, value, group=self._control))
        return values


@contextmanager
def joined_ranks(*, on_gpus: bool) -> Iterator[Collectives]:
    """Join the other ranks of this Ray Train run where `trainer.py` has them meet, and leave them at the end."""
    context = ray.train.get_context()
    if on_gpus:
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())
    dist.init_process_group(
        "nccl" if on_gpus else "gloo",
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        timeout=PATIENCE,
    )
    yield Collectives()
    dist.destroy_process_group()


def _run(operation: Callable[[], None]) -> None:
    try:
        operation()
    except RuntimeError as error:
        raise PeerLostError(str(error)) from error
