"""Train a few adapters in this process, without Ray, queue or bucket: all of them together on one base.

    results = train(base, [TrainJob("a", "a.jsonl"), TrainJob("b", "b.jsonl")], out="adapters/")

leaves `adapters/a/` and `adapters/b/`, which PEFT and vLLM load.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_core.adapter_init import LoraConfigError
from lora_core.base_model import BaseModel, too_long
from lora_core.config import LoraConfig, TrainConfig
from lora_core.dataset import DatasetError, Example, build_datasets
from lora_core.engine_job import EngineJob, JobDiverged
from lora_core.live_job import LiveJob
from lora_core.optim import Evaluation
from lora_core.peft_format import AdapterFormatError, adapter_files, read_adapter
from lora_core.trainer import TrainEngine

log = logging.getLogger("lora.library")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class TrainJob:
    """One adapter: its `name`, which is that of its folder too, a .jsonl or .parquet file, and how to train.

    `validation` is a fraction of the rows to hold out, above 0 and below 0.5, or a second file; `init_adapter` is the
    PEFT directory to start from.
    """

    name: str
    dataset: str | Path
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: float | str | Path | None = None
    init_adapter: str | Path | None = None


@dataclass(frozen=True)
class TrainResult:
    """What became of a job: the `folder` of its adapter, or the `error` that ended it.

    Losses are means over the supervised tokens of a step: the first, and the last of `steps`. Where rows are held out,
    `evaluation` is the last one and `best` the one of the lowest loss (after a step; the start does not count).
    `stopped` says why training ended before all epochs were done.
    """

    folder: Path | None
    error: str | None
    steps: int
    first_loss: float
    loss: float
    evaluation: Evaluation | None = None
    best: Evaluation | None = None
    stopped: str | None = None


class TrainJobsError(ValueError):
    """Everything that has to be changed before training can begin, a sentence each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(tuple(problems))
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)


def train(base: BaseModel, jobs: Sequence[TrainJob], out: str | Path) -> dict[str, TrainResult]:
    """Train all jobs at once, each exactly as if it were alone, and write one PEFT directory a job below `out`.

    Returns what became of each job by its name. A job that diverges, or whose files cannot be written, has an `error`
    there; the others go on.

    Raises:
        TrainJobsError: names, datasets, target modules or `out` are no good; nothing was trained.
    """
    engine = TrainEngine(base, capacity=None)
    try:
        problems = _add(engine, jobs) + _unwritable(Path(out))
        if problems:
            raise TrainJobsError(problems)
        results = {}
        while engine.live:
            for name, outcome in engine.step().items():
                live = engine.live[name]
                if isinstance(outcome, JobDiverged) or live.done:
                    engine.remove(name)
                    error = str(outcome) if isinstance(outcome, JobDiverged) else None
                    results[name] = _result(engine, live, Path(out) / name, error)
                del live  # its memory is counted no longer
        return {job.name: results[job.name] for job in jobs}
    finally:
        engine.bank.close()


def _add(engine: TrainEngine, jobs: Sequence[TrainJob]) -> list[str]:
    """Every job into the engine; all that is wrong with them."""
    problems = [] if jobs else ["there are no jobs; give at least one TrainJob"]
    names = Counter(job.name for job in jobs)
    problems += [f"{count} jobs are named {name!r}; give each a name of its own" for name, count in names.items()
                 if count > 1]  # fmt: skip
    problems += [
        f"job name {name!r} cannot be a folder's: use letters, digits, '.', '_' and '-', beginning with a letter or"
        " digit"
        for name in names
        if not NAME.fullmatch(name)
    ]
    for job in jobs:
        try:
            examples, held_out = _examples(engine.base, job)
            start = None if job.init_adapter is None else read_adapter(Path(job.init_adapter), engine.bank)
            engine.add(EngineJob(job.name, job.lora, job.train, examples, held_out, start))
        except DatasetError as error:
            problems += [f"{job.name}: {line}" for line in str(error).splitlines()]
        except LoraConfigError as error:
            problems += [f"{job.name}: {problem}" for problem in error.problems]
        except AdapterFormatError as error:
            problems.append(f"{job.name}: init_adapter: {error}")
        except ValueError as error:
            problems.append(f"{job.name}: {error}")
    return problems


def _examples(base: BaseModel, job: TrainJob) -> tuple[list[Example], list[Example]]:
    """Those to train on, and those held out."""
    if isinstance(job.validation, int | float) and not 0.0 < job.validation < 0.5:
        raise ValueError(
            f"validation must be a fraction of the rows above 0 and below 0.5, or a second file, not {job.validation}"
        )
    dataset, held_out = build_datasets(job.dataset, job.validation, base.tokenizer, job.train)
    examples, validation = dataset.examples, [] if held_out is None else held_out.examples
    if problem := too_long(base.model, max(len(example.ids) for example in (*examples, *validation))):
        raise ValueError(problem)
    return examples, validation


def _unwritable(out: Path) -> list[str]:
    """Why nothing can be written there, found by writing."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return []
    except OSError as error:
        return [f"out: nothing can be written to {out} ({error.strerror}); choose another folder"]


def _result(engine: TrainEngine, live: LiveJob, folder: Path, error: str | None) -> TrainResult:
    if error is None:
        try:
            _write(adapter_files(live.adapter, engine.bank, engine.base.source), folder)
        except OSError as problem:
            error = f"the adapter could not be written to {folder} ({problem.strerror})"
    progress = live.progress
    log.info("job=%s event=ended step=%d loss=%.4f error=%s", live.job.name, progress.step, progress.loss, error)
    return TrainResult(
        folder=folder if error is None else None,
        error=error,
        steps=progress.step,
        first_loss=progress.first_loss,
        loss=progress.loss,
        evaluation=progress.evaluation,
        best=progress.best,
        stopped=progress.stopped,
    )


def _write(files: dict[str, bytes], folder: Path) -> None:
    """Each file whole or not at all, in place of one that an earlier run left."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        partial = folder / f".{name}.partial"
        partial.write_bytes(content)
        partial.replace(folder / name)
