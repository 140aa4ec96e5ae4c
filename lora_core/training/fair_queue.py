"""Whose chunks make up a rank's next micro-batch: start-time fair queueing (Goyal, Vin and Cheng 1996).

    tag[job] += tokens of each chunk taken from it      the job with the smallest tag is served next
    tag[job] = max(tag[job], clock)                     when it brings new chunks; clock: the smallest tag there was

So jobs that have work get equal tokens over time, whatever their batches and documents are; a job that was away, or
needs little, is not owed what it did not ask for. The queue knows lengths alone, so that every rank can keep every
rank's queue and all of them know, without a message, after which micro-batch a job is complete.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_core.data.packing import Chunk


@dataclass
class _Waiting:
    chunks: deque[Chunk]
    training: bool
    tag: int


class FairQueue:
    """The chunks that one rank still has to compute, by job and in each job's own order."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Waiting] = {}
        self._tags: dict[str, int] = {}
        self._clock = 0

    def copy(self) -> FairQueue:
        """One that goes its own way from here on."""
        other = FairQueue()
        other._waiting = {job: replace(waiting, chunks=waiting.chunks.copy()) for job, waiting in self._waiting.items()}
        other._tags, other._clock = self._tags.copy(), self._clock
        return other

    def __contains__(self, job: object) -> bool:
        return job in self._waiting

    def put(self, job: str, chunks: Sequence[Chunk], *, training: bool) -> None:
        """A job's share of its next step, or of an evaluation; it has none waiting."""
        if chunks:
            self._waiting[job] = _Waiting(deque(chunks), training, max(self._tags.get(job, 0), self._clock))

    def drop(self, job: str) -> None:
        """Forget a job and what it has waiting."""
        self._waiting.pop(job, None)
        self._tags.pop(job, None)

    def take(self, capacity: int) -> tuple[list[Chunk], bool]:
        """Chunks of the next micro-batch, at most `capacity` tokens (more only where one chunk alone has more), and
        whether they are to train on. All are or none is: an evaluation has no backward pass.

        The job that is served least always gets in; a chunk that does not fit after it leaves its place to others. For
        what they had of such places they yield by a micro-batch at most, not until all have had as much.
        """
        taken: list[Chunk] = []
        tokens, training = 0, True
        candidates = dict(self._waiting)
        while candidates:
            job, waiting = min(candidates.items(), key=lambda item: item[1].tag)
            chunk = waiting.chunks[0]
            if taken and (tokens + chunk.padded_tokens > capacity or waiting.training != training):
                del candidates[job]
                continue
            training = waiting.training
            tokens += chunk.padded_tokens
            taken.append(waiting.chunks.popleft())
            if len(taken) == 1:
                self._clock = waiting.tag
            waiting.tag = min(waiting.tag + chunk.padded_tokens, self._clock + max(capacity, chunk.padded_tokens))
            if not waiting.chunks:
                self._tags[job] = waiting.tag
                del candidates[job], self._waiting[job]
        return taken, training
