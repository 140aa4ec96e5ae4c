"""What a rank of a session is given, without Ray: collectives of ranks that are threads, the driver's end of a mailbox
as a script, and a storage that can be told to fail or to wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cluster.storage.directory import DirectoryStorage
from jobs.session.messages import Assignment, DesiredJobs
from jobs.spec import JobSpec
from jobs.stored_examples import store_examples
from lora_core.data.dataset import Dataset, DatasetReport, Example
from tests.support.tiny_models import byte_tokenizer

Script = Generator[DesiredJobs, None, None]


class RankThreads:
    """The collectives of `ranks` threads of this process: `of(rank)` are one rank's."""

    def __init__(self, ranks: int = 1) -> None:
        self.ranks, self.values = ranks, [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=60)

    def of(self, rank: int) -> Any:
        return _Collectives(self, rank)


class _Collectives:
    backend = "threads"

    def __init__(self, together: RankThreads, rank: int) -> None:
        self.rank, self.ranks, self.local_ranks = rank, together.ranks, together.ranks
        self._together = together

    def gather(self, value: Any) -> list[Any]:
        self._together.values[self.rank] = value
        self._together.barrier.wait()
        values = [*self._together.values]
        self._together.barrier.wait()
        return values

    def agree(self, ask: Callable[[], Any]) -> Any:
        return self.gather(ask() if self.rank == 0 else None)[0]

    def all_reduce(self, tensor: torch.Tensor) -> None:
        tensor.copy_(torch.stack(self.gather(tensor.clone())).sum(0))

    def broadcast(self, tensor: torch.Tensor) -> None:
        tensor.copy_(self.gather(tensor.clone())[0])


class ScriptedMailbox:
    """`script` says the desired each time that rank 0 asks, and that all is over when it ends; `reports` are what ranks
    said, and `active` what rank 0 had when it asked last.
    """

    def __init__(self, script: Callable[[ScriptedMailbox], Script]) -> None:
        self.reports: list[Any] = []
        self.active: tuple[str, ...] = ()
        self._script = script(self)

    def desired(self, active: tuple[str, ...], *, wait: bool) -> DesiredJobs:
        self.active = active
        return next(self._script, DesiredJobs(stop=True))

    def send(self, report: Any) -> None:
        self.reports.append(report)

    def deliver(self, report: Any) -> None:
        self.send(report)

    def of(self, kind: type) -> list[Any]:
        """The reports of a kind."""
        return [report for report in self.reports if isinstance(report, kind)]


@dataclass
class ObservedStorage(DirectoryStorage):
    """A directory. What is read raises the next of its key's `failures`, None of which is no failure; `on_put` is
    called before anything is written.
    """

    url: str
    failures: dict[str, list[Exception | None]] = field(default_factory=dict)
    on_put: Callable[[str], None] = lambda key: None
    reads: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.url)

    def get(self, key: str, *, sha256: str | None = None) -> bytes:
        self._read(key)
        return super().get(key, sha256=sha256)

    def fetch(self, key: str, path: Path, *, sha256: str | None = None, durable: bool = True) -> None:
        self._read(key)
        super().fetch(key, path, sha256=sha256, durable=durable)

    def put(self, key: str, content: bytes | Path, *, if_absent: bool = False) -> bool:
        self.on_put(key)
        return super().put(key, content, if_absent=if_absent)

    def _read(self, key: str) -> None:
        self.reads.append(key)
        failures = self.failures.get(key)
        if failures and (failure := failures.pop(0)) is not None:
            raise failure


def assignment(
    storage: DirectoryStorage, name: str, examples: list[Example], validation: list[Example] | None = None, **train: Any
) -> Assignment:
    """A job of these examples, which lie in storage as admission puts them there."""
    sha = store_examples(storage, (dataset(examples), validation and dataset(validation)), byte_tokenizer())
    options = {"batch_size": 4, "learning_rate": 5e-3, "max_seq_len": 32, "warmup_ratio": 0.0}
    spec = JobSpec.model_validate(
        {"base_model": "tiny", "dataset": "/rows.jsonl", "adapter": name}
        | ({"validation": "/others.jsonl"} if validation else {})
        | {"lora": {"r": 4, "lora_alpha": 8}, "train": options | train}
    )
    return Assignment(name, 1, spec.model_dump_json(), sha)


def dataset(examples: list[Example]) -> Dataset:
    """These examples, as reading rows gives them."""
    lengths = tuple(len(example.ids) for example in examples)
    supervised = sum(sum(example.labels_mask) for example in examples)
    report = DatasetReport("text", len(examples), lengths, supervised, max(lengths), 32, 0, "truncate", (), ())
    return Dataset(examples, report)
