"""Train a few adapters in this process, without Ray, queue or bucket: all of them together on one base.

    results = train(base, [TrainJob("a", "a.jsonl"), TrainJob("b", "b.jsonl")], out="adapters/")

leaves `adapters/a/` and `adapters/b/`, which PEFT and vLLM load.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import SafetensorError

from lora_core.adapters.init import LoraConfigError
from lora_core.adapters.peft_format import AdapterFormatError, adapter_files, read_adapter
from lora_core.adapters.targets import AdaptableModules
from lora_core.config import LoraConfig, TrainConfig
from lora_core.data.dataset import DatasetError, DatasetReport, build_datasets
from lora_core.data.encoded_datasets import Datasets, read_datasets, write_datasets
from lora_core.models.base import BaseModel, token_rows, too_long
from lora_core.models.forward import ForwardPath, forward_path, open_forward
from lora_core.training.active_job import CheckpointMismatchError, LiveJob
from lora_core.training.checkpoints import CheckpointWriter
from lora_core.training.engine import TrainEngine
from lora_core.training.job import EngineJob, JobDiverged
from lora_core.training.optimizer import Evaluation, Snapshot

log = logging.getLogger("lora.library")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
Reports = tuple[DatasetReport, DatasetReport | None]
"""Of the training rows, and of the validation rows."""

CHECKPOINTS, PARTIAL = ".checkpoints", ".partial"  # below `out`: no job's name begins so
ENCODED = ".encoded"


@dataclass(frozen=True)
class TrainJob:
    """One adapter: its `name`, which is that of its folder too, a .jsonl, .json, .csv or .parquet file, and how to
    train.

    `validation` is a fraction of the rows to validate on, above 0 and below 0.5, or a second file; `init_adapter` is
    the PEFT directory to start from.
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

    Losses are means over the supervised tokens, or the pairs, of a step: the first, and the last of `steps`. Where
    there are validation rows, `evaluation` is the last one and `best` the one of the lowest loss (after a step; the
    start does not count). `stopped` says why training ended before all epochs were done, `path` how the base computed
    (`models/forward.py`).

    `dataset` is what the rows to train on came to, with those that were dropped or truncated and the columns that were
    ignored, and `validation` the same of the validation rows; `lines()` of either are for people.
    """

    folder: Path | None
    error: str | None
    steps: int
    first_loss: float
    loss: float
    dataset: DatasetReport
    validation: DatasetReport | None = None
    evaluation: Evaluation | None = None
    best: Evaluation | None = None
    stopped: str | None = None
    path: ForwardPath = "llama"


class TrainJobsError(ValueError):
    """Everything that has to be changed before training can begin, a sentence each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(tuple(problems))
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)


def train(
    base: BaseModel,
    jobs: Sequence[TrainJob],
    out: str | Path,
    *,
    resume: bool = False,
    checkpoint_seconds: float | None = 300.0,
) -> dict[str, TrainResult]:
    """Train all jobs at once, each exactly as if it were alone, and write one PEFT directory a job below `out`. Jobs
    that take another path through the base than others (`models/forward.py`: PiSSA, an adapted head) are trained
    together after those.

    Returns what became of each job by its name. A job that diverges, or whose files cannot be written, has an `error`
    there; the others go on.

    Every `checkpoint_seconds` the state of a job is written to `out` beside the steps of all (None: never), and its
    last one where it ends; they are gone once all adapters of the call are there. With `resume` jobs continue from what
    a call left that was killed or in which some failed, in eager fp32 on a CPU to the same bits: those whose last state
    is there are not trained again, and those that have none begin. What rows became lies there too, since a chat
    template may show today's date.

    Raises:
        TrainJobsError: names, datasets, target modules or `out` are no good, or a checkpoint is of other settings, rows
            or another base; nothing was trained.
    """
    engines: dict[ForwardPath, TrainEngine] = {}
    checkpoints = _Checkpoints(Path(out) / CHECKPOINTS, base, checkpoint_seconds)
    results: dict[str, TrainResult] = {}
    reports: dict[str, Reports] = {}

    def end(engine: TrainEngine, name: str, error: str | None = None) -> None:
        live = engine.live[name]
        engine.remove(name)
        results[name] = _result(engine, live, Path(out) / name, error, reports[name])
        if error is None:
            checkpoints.writer.write(name, live)
        else:
            checkpoints.remove(name)  # from there it would diverge again

    try:
        problems = _add(base, engines, jobs, checkpoints, resume, reports) + _unwritable(Path(out))
        if problems:
            raise TrainJobsError(problems)
        for name, of_job in reports.items():
            _log_rows(name, *of_job)
        if not resume:
            checkpoints.clear([job.name for job in jobs])
        for engine in engines.values():
            for name in [name for name, live in engine.live.items() if live.done]:  # before they were interrupted
                end(engine, name)
            while engine.live:
                for name, outcome in engine.step().items():
                    if isinstance(outcome, JobDiverged):
                        end(engine, name, str(outcome))
                    elif engine.live[name].done:
                        end(engine, name)
                checkpoints.writer.write_oldest(engine.live)
    finally:
        checkpoints.writer.close()
        for engine in engines.values():
            engine.forward.close()
    if all(result.folder is not None for result in results.values()):
        checkpoints.clear(list(results))
    return {job.name: results[job.name] for job in jobs}


class _Checkpoints:
    """The states of jobs, a file each, and what their rows became beside."""

    def __init__(self, folder: Path, base: BaseModel, seconds: float | None) -> None:
        self._folder = folder
        self._base = f"{base.fingerprint} in {base.precision}"
        self.writer = CheckpointWriter(seconds, self._write)
        self._encoded: dict[str, tuple[Datasets, str | None]] = {}  # what is not written yet, and what it was made of

    def datasets(self, job: TrainJob, base: BaseModel, resume: bool) -> Datasets:
        """What a job's rows became when it began, where it is resumed with the same files; else what they are now.

        Raises:
            DatasetError: they cannot be trained on.
            ValueError: what was written cannot be read.
        """
        source = _source(job)
        if resume and self.path(job.name).exists() and (path := self._encoded_path(job.name)).exists():
            encoded, of = read_datasets(path)
            if source is not None and of == source:
                return encoded
        datasets = build_datasets(job.dataset, job.validation, base.tokenizer, job.train, token_rows(base.model))
        self._encoded[job.name] = datasets, source
        return datasets

    def read(self, name: str) -> bytes | None:
        """The state of a job, if it has one.

        Raises:
            ValueError: it cannot be read, or is one of another base.
        """
        path = self.path(name)
        if not path.exists():
            return None
        try:
            blob = path.read_bytes()
            base = Snapshot.load(blob).counters["base"]
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise ValueError(
                f"the checkpoint {path} cannot be read ({error}): remove it to begin without it"
            ) from error
        if base != self._base:
            raise ValueError(f"the checkpoint {path} is of another base or precision: go back to that, or remove it")
        return blob

    def _write(self, name: str, _: int, snapshot: Snapshot) -> None:
        snapshot = replace(snapshot, counters=snapshot.counters | {"base": self._base})
        path = self.path(name)
        partial = path.with_suffix(PARTIAL)
        path.parent.mkdir(exist_ok=True)
        if name in self._encoded:
            write_datasets(self._encoded[name][0], partial, self._encoded[name][1])
            partial.replace(self._encoded_path(name))
            del self._encoded[name]
        snapshot.write(partial)
        partial.replace(path)

    def remove(self, name: str) -> None:
        """Of a job that cannot go on."""
        self.writer.wait()
        self.path(name).unlink(missing_ok=True)

    def clear(self, names: Sequence[str]) -> None:
        """Remove these jobs'; another call may have others in the same place."""
        for path in map(self.path, names):
            path.unlink(missing_ok=True)
            path.with_suffix(ENCODED).unlink(missing_ok=True)
            path.with_suffix(PARTIAL).unlink(missing_ok=True)  # of a call that was killed while it wrote
        with suppress(OSError):  # there is none, or others are in it
            self._folder.rmdir()

    def path(self, name: str) -> Path:
        """Of a job's state."""
        return self._folder / f"{name}.safetensors"

    def _encoded_path(self, name: str) -> Path:
        return self.path(name).with_suffix(ENCODED)


def _source(job: TrainJob) -> str | None:
    """Say what a job's examples are made of, beside the tokenizer and its template; None where a file is missing."""
    parts: list[str | float | None] = [job.train.model_dump_json()]
    for given in (job.dataset, job.validation):
        if not isinstance(given, str | Path):
            parts.append(given)
            continue
        try:
            with Path(given).open("rb") as stream:
                parts.append(hashlib.file_digest(stream, "sha256").hexdigest())
        except OSError:
            return None
    return json.dumps(parts)


def _add(
    base: BaseModel,
    engines: dict[ForwardPath, TrainEngine],
    jobs: Sequence[TrainJob],
    states: _Checkpoints,
    resume: bool,
    reports: dict[str, Reports],
) -> list[str]:
    """Put every job into the engine of its path, as its checkpoint has it, and what its rows come to into `reports`;
    return all that is wrong with them.
    """
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
            dataset, validating = _datasets(base, job, states, resume and bool(NAME.fullmatch(job.name)))
            reports[job.name] = dataset.report, validating.report if validating else None
            validation = validating.examples if validating else []
            path = forward_path(base.model.config, AdaptableModules(base.model), job.lora, base.precision)
            if path not in engines:
                engines[path] = TrainEngine(base, forward=open_forward(base, path), capacity=None)
            modules = engines[path].forward.modules
            start = None if job.init_adapter is None else read_adapter(Path(job.init_adapter), modules)
            checkpoint = states.read(job.name) if resume and NAME.fullmatch(job.name) else None
            wanted = EngineJob(job.name, job.lora, job.train, dataset.examples, validation, start)
            engines[path].add(wanted, checkpoint)
        except DatasetError as error:
            problems += [f"{job.name}: {line}" for line in str(error).splitlines()]
        except LoraConfigError as error:
            problems += [f"{job.name}: {problem}" for problem in error.problems]
        except AdapterFormatError as error:
            problems.append(f"{job.name}: init_adapter: {error}")
        except CheckpointMismatchError as error:
            problems.append(f"{job.name}: {error}: go back to those, or remove {states.path(job.name)}")
        except ValueError as error:
            problems.append(f"{job.name}: {error}")
    return problems


def _datasets(base: BaseModel, job: TrainJob, states: _Checkpoints, resume: bool) -> Datasets:
    """Return the examples to train and to validate on."""
    if isinstance(job.validation, int | float) and not 0.0 < job.validation < 0.5:
        raise ValueError(
            f"validation must be a fraction of the rows above 0 and below 0.5, or a second file, not {job.validation}"
        )
    dataset, validation = states.datasets(job, base, resume)
    if problem := too_long(base.model, max(max(part.report.lengths) for part in (dataset, validation) if part)):
        raise ValueError(problem)
    return dataset, validation


def _log_rows(name: str, dataset: DatasetReport, validation: DatasetReport | None) -> None:
    """Log what the rows of a job come to; what is lost as warnings, which are seen where no log was asked for."""
    logged: list[str] = []
    for title, report in (("dataset", dataset), ("validation", validation)):
        if report is not None:
            log.info("job=%s event=%s contents=%r", name, title, "; ".join(report.contents()))
            for loss in report.losses():
                if loss not in logged:  # both parts of one file ignore the same columns
                    log.warning("job=%s event=%s loss=%r", name, title, loss)
                    logged.append(loss)


def _unwritable(out: Path) -> list[str]:
    """Say why nothing can be written there, found by writing."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return []
    except OSError as error:
        return [f"out: nothing can be written to {out} ({error.strerror}); choose another folder"]


def _result(engine: TrainEngine, live: LiveJob, folder: Path, error: str | None, reports: Reports) -> TrainResult:
    if error is None:
        try:
            _write(adapter_files(live.adapter, engine.forward.modules, engine.base.source), folder)
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
        dataset=reports[0],
        validation=reports[1],
        evaluation=progress.evaluation,
        best=progress.best,
        stopped=progress.stopped,
        path=engine.forward.name,
    )


def _write(files: dict[str, bytes], folder: Path) -> None:
    """Write each file whole or not at all, over one that an earlier run left."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        partial = folder / f".{name}.partial"
        partial.write_bytes(content)
        partial.replace(folder / name)
