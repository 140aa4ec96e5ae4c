"""What one rank does by itself; the ranks together are tested in `test_service.py`."""

from __future__ import annotations

import gc
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.settings import Settings
from cluster.storage.base import StorageCorrupt, StorageUnavailable
from cluster.storage.keys import examples_key
from jobs.job import FailureCode
from jobs.session import loader as job_reader
from jobs.session import rank as training_loop
from jobs.session.loader import JobReader
from jobs.session.messages import (
    AdapterKept,
    Assignment,
    CheckpointWritten,
    DesiredJobs,
    Evaluated,
    JobFailed,
    NoRoom,
    RankBroke,
    RungReached,
    StepsDone,
    Trained,
)
from jobs.session.rank import Rank
from jobs.session.report import OF_PRODUCTS, ActiveJob, probe_of
from lora_core.adapters.peft_format import read_adapter
from lora_core.models.probes import probe_losses
from lora_core.training.engine import TrainEngine
from lora_core.training.memory.predictor import DoesNotFitError, NoRoomBesideError
from tests.support.models import documents, job, tiny_base
from tests.support.ranks import ObservedStorage, RankThreads, Script, ScriptedMailbox, assignment
from tests.support.tiny_models import load_on_cpu, save_random


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def storage(tmp_path: Path) -> ObservedStorage:
    return ObservedStorage((tmp_path / "storage").as_uri())


class Session:
    """Ranks on the tiny base, as many as there are storages."""

    def __init__(self, folder: Path, home: Path) -> None:
        self._settings = {"home": home, "base_models": {"tiny": str(folder)}, "threads": 1}

    def run(self, mailbox: Any, *storages: ObservedStorage, checkpoint_seconds: float = 1e9) -> None:
        settings = Settings(**self._settings, checkpoint_seconds=checkpoint_seconds)
        together = RankThreads(len(storages))
        ranks = [Rank(settings, mailbox, mine, together.of(n), "tiny", "fp32") for n, mine in enumerate(storages)]
        with ThreadPoolExecutor(len(ranks)) as threads:
            for ended in [threads.submit(rank.run) for rank in ranks]:
                ended.result()


@pytest.fixture
def session(folder: Path, tmp_path: Path) -> Iterator[Session]:
    yield Session(folder, tmp_path)
    gc.unfreeze()  # ranks freeze what is there


def test_ranks_share_the_cpus_that_they_may_use(
    storage: ObservedStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    mailbox: Any = None
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(7)))
    monkeypatch.setattr("torch.set_num_threads", told.append)
    for threads in (0, 5):
        settings = Settings(home=tmp_path, threads=threads)
        Rank(settings, mailbox, storage, RankThreads(2).of(0), "tiny", "fp32")
    assert told == [3, 5]


# --- what a job needs is read ----------------------------------------------------------------------------------------


def reader_and_job(storage: ObservedStorage, monkeypatch: pytest.MonkeyPatch) -> tuple[JobReader, Assignment]:
    monkeypatch.setattr(job_reader, "STORAGE_PAUSE", 0.0)
    return JobReader(storage, TrainEngine(tiny_base("llama")), rank=0), assignment(storage, "a", documents(4, 0))


@pytest.mark.parametrize("away", [2, 0])
def test_a_job_outlives_a_storage_that_is_away(
    storage: ObservedStorage, monkeypatch: pytest.MonkeyPatch, away: int
) -> None:
    reader, wanted = reader_and_job(storage, monkeypatch)
    storage.failures[examples_key(str(wanted.examples_sha))] = [StorageUnavailable("503")] * away
    reader.prepare([wanted], ())
    _, prepared, _ = reader.reading["a"][1].result(60)
    assert (prepared.job.name, len(storage.reads)) == ("a", away + 1)


def test_what_waiting_does_not_mend_is_told_at_once(storage: ObservedStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, wanted = reader_and_job(storage, monkeypatch)
    storage.failures[examples_key(str(wanted.examples_sha))] = [StorageCorrupt("other bytes")]
    reader.prepare([wanted], ())
    with pytest.raises(StorageCorrupt):
        reader.reading["a"][1].result(60)


@pytest.mark.parametrize("patience", [0.0, 1e9])
def test_nobody_waits_for_ever_nor_for_a_job_that_is_not_wanted(
    storage: ObservedStorage, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    reader, wanted = reader_and_job(storage, monkeypatch)
    monkeypatch.setattr(job_reader, "STORAGE_PATIENCE", patience)
    storage.failures[examples_key(str(wanted.examples_sha))] = [StorageUnavailable("503")] * 1_000_000
    reader.prepare([wanted], ())
    work = reader.reading["a"][1]
    if patience:
        reader.prepare([], ())
    with pytest.raises(StorageUnavailable):
        work.result(60)


# --- jobs come and go ------------------------------------------------------------------------------------------------


def test_a_job_without_room_beside_others_waits_and_one_that_never_fits_fails(
    session: Session, storage: ObservedStorage, tmp_path: Path
) -> None:
    """Whatever one rank of two says."""
    names = ("a", "waits", "fails")
    a, waits, fails = (assignment(storage, name, documents(6, n), epochs=100) for n, name in enumerate(names))
    other = ObservedStorage(storage.url)
    other.failures[examples_key(str(waits.examples_sha))] = [NoRoomBesideError("not beside a")]
    storage.failures[examples_key(str(fails.examples_sha))] = [NoRoomBesideError("not beside a")]
    other.failures[examples_key(str(fails.examples_sha))] = [DoesNotFitError("not at all")]

    def script(mailbox: ScriptedMailbox) -> Script:
        while "a" not in mailbox.active:
            yield DesiredJobs((a,))
        for one in (waits, fails):
            while one.job_id not in {report.job_id for report in mailbox.of(NoRoom) + mailbox.of(JobFailed)}:
                assert set(mailbox.active) <= {"a"}
                yield DesiredJobs((a, one))

    mailbox = ScriptedMailbox(script)
    session.run(mailbox, storage, other)
    assert mailbox.of(NoRoom) == [NoRoom("waits", 1)]
    reason = "rank 1: DoesNotFitError: not at all"
    (failed,) = mailbox.of(JobFailed)
    assert failed == JobFailed("fails", reason, failed.traceback, FailureCode.OUT_OF_MEMORY)
    assert failed.traceback is not None and failed.traceback.endswith("DoesNotFitError: not at all\n")


def test_how_long_a_job_takes_is_told_from_what_is_left_of_it() -> None:
    """Ten documents, two epochs, at the rate of the products: half of it once half is done, or with two ranks."""
    engine = TrainEngine(tiny_base("llama"))
    live = engine.add(job("a", examples=documents(10, 0, 8, 8), epochs=2, batch_size=2))
    active = ActiveJob(Assignment("a", 1, "{}", ""), None, live, "")  # type: ignore[arg-type]
    parameters = engine.base.parameters
    alone = active.expected_seconds(engine.base, 1e6, ranks=1)
    assert alone == pytest.approx(4 * parameters * 160 / (1e6 * OF_PRODUCTS))
    assert active.expected_seconds(engine.base, 1e6, ranks=2) == alone / 2
    live.progress.step = live.job.steps // 2
    assert active.expected_seconds(engine.base, 1e6, ranks=1) == pytest.approx(alone / 2)
    pairs = engine.add(job("b", examples=documents(10, 0, 8, 8), epochs=2, batch_size=2, method="dpo"))
    active = ActiveJob(Assignment("b", 1, "{}", ""), None, pairs, "")  # type: ignore[arg-type]
    assert active.expected_seconds(engine.base, 1e6, ranks=1) == pytest.approx(alone * 3.5 / 2)


class SlowMailbox(ScriptedMailbox):
    """Takes nothing that waits to be delivered before `open` is set, and then raises for a job in `refused`."""

    def __init__(self, script: Callable[[ScriptedMailbox], Script], refused: tuple[str, ...] = ()) -> None:
        super().__init__(script)
        self.open, self.arrived = threading.Event(), threading.Event()
        self._refused = refused

    def deliver(self, report: Any) -> None:
        if isinstance(report, Trained):
            self.arrived.set()
            assert self.open.wait(60)
            if report.job_id in self._refused:
                raise ConnectionError("no mailbox")
        super().deliver(report)


def short_and_long(storage: ObservedStorage) -> tuple[Assignment, Assignment]:
    """The first has one step and three examples."""
    short = assignment(storage, "short", documents(3, 1), epochs=1, batch_size=3)
    return short, assignment(storage, "long", documents(10, 0), epochs=100_000)


def test_what_broke_a_rank_is_told_after_what_had_ended_and_of_what_had_not(
    session: Session, storage: ObservedStorage
) -> None:
    """A job that is being published is neither blamed nor trained again, unless that is what failed."""
    short, long = short_and_long(storage)
    ended, spoilt = replace(short, job_id="ended"), replace(short, job_id="spoilt")

    def script(mailbox: ScriptedMailbox) -> Script:
        assert isinstance(mailbox, SlowMailbox)
        while "long" not in mailbox.active:
            yield DesiredJobs((long,))
        for _ in range(100):
            yield DesiredJobs((long, ended, spoilt))
        assert mailbox.arrived.wait(60)
        threading.Timer(0.1, mailbox.open.set).start()
        raise RuntimeError("out of luck")

    mailbox = SlowMailbox(script, refused=("spoilt",))
    with pytest.raises(RuntimeError, match="out of luck"):
        session.run(mailbox, storage)
    assert [report.job_id for report in mailbox.of(Trained)] == ["ended"]
    broke = mailbox.reports[-1]
    assert isinstance(broke, RankBroke) and broke.traceback is not None
    assert broke == RankBroke(0, "RuntimeError: out of luck", ("long", "spoilt"), broke.traceback)
    assert broke.traceback.endswith("RuntimeError: out of luck\n")


def test_checkpoints_are_written_one_at_a_time_and_none_waits_for_ever(
    session: Session, storage: ObservedStorage
) -> None:
    """Each is held up until the jobs have made two more steps."""
    jobs = [assignment(storage, name, documents(4, n), epochs=100_000) for n, name in enumerate("abc")]
    asked, writing, written = itertools.count(), threading.Lock(), []
    went_on = threading.Semaphore(0)

    def on_put(key: str) -> None:
        assert writing.acquire(blocking=False), "two at a time"
        for _ in range(2):
            assert went_on.acquire(timeout=60)
        written.append(key.split("/")[1])
        writing.release()

    storage.on_put = on_put

    def script(mailbox: ScriptedMailbox) -> Script:
        while len(mailbox.of(CheckpointWritten)) < 5:
            if len(mailbox.active) == 3:
                went_on.release()
            assert next(asked) < 10_000
            yield DesiredJobs(tuple(jobs))
        went_on.release(100)

    mailbox = ScriptedMailbox(script)
    session.run(mailbox, storage, checkpoint_seconds=0.0)
    assert [report.job_id for report in mailbox.of(CheckpointWritten)][:5] == written[:5]
    # The first is written before the others may have joined; from then on they take turns.
    assert set(written[1:4]) == {"a", "b", "c"} and written[4] == written[1]


def test_a_paused_job_leaves_once_it_is_written_and_goes_on_from_there(
    session: Session, storage: ObservedStorage
) -> None:
    """Until then the driver takes it to be there, so that it does not move the job before its checkpoint counts."""
    _, long = short_and_long(storage)
    other, open_ = assignment(storage, "other", documents(4, 2), epochs=100_000), threading.Event()
    storage.on_put = lambda _: assert_set(open_)

    def script(mailbox: ScriptedMailbox) -> Script:
        while set(mailbox.active) != {"long", "other"}:
            yield DesiredJobs((long, other))
        for _ in range(5):
            yield DesiredJobs((long, other))
        for _ in range(5):
            yield DesiredJobs((other,), pausing=("long",))
            assert set(mailbox.active) == {"long", "other"} and not mailbox.of(CheckpointWritten)
        open_.set()
        while "long" in mailbox.active:
            yield DesiredJobs((other,), pausing=("long",))
        (first,) = mailbox.of(CheckpointWritten)
        resumed = replace(long, attempt=2, checkpoint_key=first.key, checkpoint_sha256=first.sha256)
        while "long" not in mailbox.active:
            yield DesiredJobs((resumed, other))
        while "long" in mailbox.active:
            yield DesiredJobs((other,), pausing=("long",))

    mailbox = ScriptedMailbox(script)
    session.run(mailbox, storage)
    first, second = mailbox.of(CheckpointWritten)
    assert first.job_id == second.job_id == "long" and 0 < first.step <= second.step
    # Of every step there are metrics, before what comes after it; a job that goes on tells of the steps after those.
    cut = [0, *(mailbox.reports.index(one) for one in (first, second))]
    parts = [mailbox.reports[start:end] for start, end in itertools.pairwise(cut)]
    steps = [
        [one for report in part if isinstance(report, StepsDone) for job in report.jobs if job.job_id == "long"
         for one in job.steps] for part in parts
    ]  # fmt: skip
    assert [one.step for one in steps[0]] == [*range(1, first.step + 1)]
    assert [one.step for one in steps[1]] == [*range(first.step + 1, second.step + 1)]
    figures = steps[0][0].figures
    assert set(figures) == {"train_loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes"}
    assert figures["learning_rate"] == 5e-3 and all(value > 0 for value in figures.values())
    assert mailbox.of(StepsDone)[-1].tokens_per_second > 0


def test_a_trial_leaves_at_its_rung_once_it_is_written_and_ends_as_if_it_had_not(
    session: Session, storage: ObservedStorage
) -> None:
    """On both ranks, beside another job; what it was after its epochs until then is not kept."""
    job, rows = assignment(storage, "trial", documents(8, 1), documents(4, 3), epochs=4), documents(4, 2)
    other = assignment(storage, "other", rows, epochs=100_000)

    def script(mailbox: ScriptedMailbox) -> Script:
        for attempt, until, report in ((1, 5, RungReached), (2, 8, RungReached), (3, None, Trained)):
            written = {"checkpoint_key": one.key, "checkpoint_sha256": one.sha256} if (one := newest(mailbox)) else {}
            trial = replace(job, attempt=attempt, until_step=until, **written)
            before = len(mailbox.of(report))
            while len(mailbox.of(report)) == before:
                yield DesiredJobs((trial, other))
            while "trial" in mailbox.active:
                yield DesiredJobs((other,))

    def newest(mailbox: ScriptedMailbox) -> CheckpointWritten | None:
        return ([None, *mailbox.of(CheckpointWritten)])[-1]

    mailbox = ScriptedMailbox(script)
    session.run(mailbox, storage, storage)
    first, second = mailbox.of(RungReached)
    losses = [report.evaluation["loss"] for report in mailbox.of(Evaluated) if report.job_id == "trial"]
    assert (first.job_id, first.step, second.step) == ("trial", 5, 8) and first.loss in losses
    assert second.loss == losses[-1]
    told = [report for report in mailbox.reports if isinstance(report, CheckpointWritten | RungReached)]
    assert [type(report) for report in told] == [CheckpointWritten, RungReached] * 2

    def alone(mailbox: ScriptedMailbox) -> Script:
        while not mailbox.of(Trained):
            yield DesiredJobs((job,))

    once = ScriptedMailbox(alone)
    session.run(once, storage, storage)
    (trained,), (straight,) = mailbox.of(Trained), once.of(Trained)
    assert trained.files == straight.files and {kept.job_id for kept in mailbox.of(AdapterKept)} <= {"other"}


def assert_set(event: threading.Event) -> None:
    assert event.wait(60)


# --- a job ends ------------------------------------------------------------------------------------------------------


def test_a_job_is_published_beside_the_steps_of_the_others(
    session: Session, storage: ObservedStorage, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its probes are one pass, and there are steps before the driver has taken what ended. It is desired until then,
    and it is not read again; another attempt is. What is done is published, and not checkpointed.
    """
    short, long = short_and_long(storage)
    trace: list[str] = []
    micro_batch, checkpoints = TrainEngine.micro_batch, []

    def stepped(engine: TrainEngine) -> Any:
        trace.append("step")
        return micro_batch(engine)

    def probed(*arguments: Any) -> list[float]:
        trace.append("probe")
        return probe_losses(*arguments)

    monkeypatch.setattr(TrainEngine, "micro_batch", stepped)
    monkeypatch.setattr(training_loop, "probe_losses", probed)
    storage.on_put = lambda key: checkpoints.append(key.split("/")[1])

    def reads() -> int:
        return storage.reads.count(examples_key(str(short.examples_sha)))

    def script(mailbox: ScriptedMailbox) -> Script:
        assert isinstance(mailbox, SlowMailbox)
        while "long" not in mailbox.active:
            yield DesiredJobs((long,))
        while not mailbox.arrived.is_set():
            yield DesiredJobs((short, long))
        for _ in range(5):
            yield DesiredJobs((short, long))
            assert set(mailbox.active) == {"short", "long"} and reads() == 1
        mailbox.open.set()
        while not mailbox.of(Trained):
            yield DesiredJobs((short, long))
        assert reads() == 1
        while len(mailbox.of(Trained)) < 2:
            yield DesiredJobs((replace(short, attempt=2), long))

    mailbox = SlowMailbox(script)
    session.run(mailbox, storage, checkpoint_seconds=0.0)
    first, again = mailbox.of(Trained)
    start = trace.index("probe")
    assert trace[start : start + 4] == ["probe", "step", "step", "step"] and trace.count("probe") == reads() == 2
    assert "long" in checkpoints and "short" not in checkpoints
    assert first.job_id == again.job_id == "short"
    base = load_on_cpu(folder, tmp_path / "cache")
    engine = TrainEngine(base)
    for name, content in first.files.items():
        (tmp_path / name).write_bytes(content)
    losses = [probe["loss"] for probe in first.manifest["probes"]]
    adapter, probes = read_adapter(tmp_path, engine.forward.modules), [*map(probe_of, documents(3, 1))]
    assert losses == pytest.approx(probe_losses(engine.forward, engine.forward.load(adapter), probes), rel=1e-4)
    assert losses != pytest.approx(probe_losses(engine.forward, None, probes), rel=1e-4)


def test_a_job_of_preferences_trains_beside_another_and_tells_its_rewards(
    session: Session, storage: ObservedStorage
) -> None:
    _, long = short_and_long(storage)
    rows = documents(8, 3)
    pairs = assignment(storage, "pairs", rows, rows[:4], method="dpo", beta=0.5, batch_size=2, epochs=4)

    def script(mailbox: ScriptedMailbox) -> Script:
        while not mailbox.of(Trained):
            yield DesiredJobs((long, pairs))

    mailbox = ScriptedMailbox(script)
    session.run(mailbox, storage)
    (trained,) = mailbox.of(Trained)
    metrics = trained.manifest["metrics"]
    assert (trained.job_id, metrics["step"], len(trained.manifest["probes"])) == ("pairs", 8, 4)
    assert metrics["first_loss"] == pytest.approx(math.log(2), rel=1e-3) and metrics["loss"] < 0.6
    assert metrics["reward_accuracy"] == 1.0 and metrics["reward_margin"] > 0.2
    assert metrics["validation_accuracy"] == 1.0 and metrics["validation_reward_margin"] > 0.2
    assert trained.progress.items() >= metrics.items()
    steps = [
        step for report in mailbox.of(StepsDone) for one in report.jobs if one.job_id == "pairs" for step in one.steps
    ]
    figures, names = steps[-1].figures, ("reward_accuracy", "reward_margin", "validation_accuracy")
    told = [figures[name] for name in ("train_reward_accuracy", "train_reward_margin", "valid_reward_accuracy")]
    assert told == [metrics[name] for name in names]
    assert figures["valid_reward_margin"] == metrics["validation_reward_margin"]


def test_publishing_that_fails_is_no_secret(session: Session, storage: ObservedStorage) -> None:
    short, long = short_and_long(storage)

    def script(mailbox: ScriptedMailbox) -> Script:
        for _ in range(1000):
            yield DesiredJobs((short, long))

    mailbox = SlowMailbox(script, refused=("short",))
    mailbox.open.set()
    with pytest.raises(ConnectionError, match="no mailbox"):
        session.run(mailbox, storage)
    broke = mailbox.reports[-1]
    assert isinstance(broke, RankBroke) and broke.traceback is not None
    assert broke == RankBroke(0, "ConnectionError: no mailbox", ("long", "short"), broke.traceback)
    assert broke.traceback.endswith("ConnectionError: no mailbox\n")


def test_epochs_leave_what_a_job_that_ends_there_publishes(session: Session, storage: ObservedStorage) -> None:
    """Two steps an epoch, and an evaluation after each: of eight epochs the second, fourth and sixth, and of three all
    but the last, which is published.
    """
    constant = {"lr_scheduler": "constant", "batch_size": 5}
    jobs = [
        assignment(storage, f"of-{epochs}", documents(10, 0), validation=documents(3, 5), epochs=epochs, **constant)
        for epochs in (1, 2, 3, 4, 8)
    ]

    def script(mailbox: ScriptedMailbox) -> Script:
        while len(mailbox.of(Trained)) < len(jobs):
            ended = {report.job_id for report in mailbox.of(Trained)}
            yield DesiredJobs(tuple(job for job in jobs if job.job_id not in ended))

    mailbox = ScriptedMailbox(script)
    session.run(mailbox, storage)
    published = {report.job_id: report for report in mailbox.of(Trained)}
    kept: dict[str, list[int]] = {}
    for report in mailbox.of(AdapterKept):
        step = report.manifest["metrics"]["step"]
        kept.setdefault(report.job_id, []).append(step)
        whole = published.get(f"of-{step // 2}")
        if whole is not None:
            assert report.files == whole.files
            assert report.manifest["metrics"] == whole.manifest["metrics"]
            assert report.manifest["metrics"]["validation_step"] == step and len(report.manifest["probes"]) == 4
    assert kept == {"of-2": [2], "of-3": [2, 4], "of-4": [2, 4, 6], "of-8": [4, 8, 12]}
