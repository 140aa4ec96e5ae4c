"""`lora_core` as a library: many jobs in, one PEFT directory a job out, or every mistake at once."""

from __future__ import annotations

import json
import math
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lora_core
from lora_core import LoraConfig, TrainConfig, TrainJob, TrainJobsError
from lora_core.data.dataset import split
from lora_core.models.base import BaseModel, load_base
from lora_core.training.active_job import LiveJob, PreparedJob
from lora_core.training.engine import TrainEngine
from tests.support.rows import chat, clock_says
from tests.support.tiny_models import DATED_TEMPLATE, save_tiny_model, with_more_tokens

ROOT = Path(__file__).parents[2]
SHORT = TrainConfig(epochs=2, batch_size=4, learning_rate=5e-3, max_seq_len=64)


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    folder = save_tiny_model("llama", tmp_path / "base")
    return load_base(str(folder), precision="fp32", cache_dir=tmp_path / "cache", device=torch.device("cpu"))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n} + 1 = ", "completion": str(n + 1)}) + "\n" for n in range(10)))
    return path


def test_the_readmes_ten_lines_run(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a tiny base and ten rows of each dataset; `load_base` is asked for in the README's own words."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (script,) = [block for block in blocks if block.startswith("import lora_core")]
    assert len([line for line in script.splitlines() if line.strip()]) <= 10
    (tmp_path / "jobs/examples").mkdir(parents=True)
    for name in ("triage", "tone"):
        rows = (ROOT / f"jobs/examples/{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"jobs/examples/{name}.jsonl").write_text("".join(rows[:10]))
    script = re.sub(r'load_base\("[^"]*"', f'load_base({base.source!r}, cache_dir="cache"', script)
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    for name in ("triage", "tone"):
        assert re.search(rf"^{name} adapters/{name}: loss \d", printed, re.MULTILINE), printed
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.source), f"adapters/{name}")


def test_jobs_of_both_paths_together_leave_what_each_leaves_alone(
    base: BaseModel, dataset: Path, tmp_path: Path
) -> None:
    jobs = [
        TrainJob("a", dataset, LoraConfig(r=4, lora_dropout=0.1), SHORT),
        TrainJob("b", dataset, LoraConfig(r=8), SHORT.model_copy(update={"epochs": 3, "seed": 1})),
        TrainJob("pissa", dataset, LoraConfig(r=4, init_lora_weights="pissa"), SHORT),
    ]
    together = lora_core.train(base, jobs, tmp_path / "together")
    assert {name: result.path for name, result in together.items()} == {"a": "llama", "b": "llama", "pissa": "hooks"}
    for job in jobs:
        alone = lora_core.train(base, [job], tmp_path / "alone")[job.name]
        result = together[job.name]
        assert result.folder == tmp_path / "together" / job.name
        assert alone.folder is not None and result.error is None
        assert result.steps == 3 * job.train.epochs
        assert (result.loss, result.first_loss) == (alone.loss, alone.first_loss)
        assert result.loss < result.first_loss
        names = sorted(path.name for path in result.folder.iterdir())
        assert names == ["adapter_config.json", "adapter_model.safetensors"]
        for name in names:
            assert (result.folder / name).read_bytes() == (alone.folder / name).read_bytes()


def test_a_job_starts_from_a_peft_directory(base: BaseModel, dataset: Path, tmp_path: Path) -> None:
    first = lora_core.train(base, [TrainJob("a", dataset, train=SHORT)], tmp_path / "first")["a"]
    again = TrainJob("a", dataset, train=SHORT, init_adapter=first.folder)
    second = lora_core.train(base, [again], tmp_path / "second")["a"]
    assert second.first_loss < 0.9 * first.first_loss
    with pytest.raises(TrainJobsError, match="b: init_adapter: none: not a readable PEFT adapter"):
        lora_core.train(base, [TrainJob("b", dataset, init_adapter=tmp_path / "none")], tmp_path / "third")


def test_hooks_are_off_the_base_afterwards(base: BaseModel, dataset: Path, tmp_path: Path) -> None:
    lora_core.train(base, [TrainJob("a", dataset, train=SHORT)], tmp_path / "out")
    with pytest.raises(TrainJobsError):
        lora_core.train(base, [], tmp_path / "out")
    assert not any(module._forward_hooks for module in base.model.modules())


def test_a_job_that_diverges_says_so_and_the_other_ends_well(base: BaseModel, dataset: Path, tmp_path: Path) -> None:
    wild = SHORT.model_copy(update={"learning_rate": 1e30, "max_grad_norm": 1e30})
    jobs = [TrainJob("wild", dataset, train=wild), TrainJob("good", dataset, train=SHORT)]
    results = lora_core.train(base, jobs, tmp_path / "out")
    assert list(results) == ["wild", "good"]
    assert results["wild"].folder is None and "lower learning_rate" in str(results["wild"].error)
    assert not (tmp_path / "out" / "wild").exists()
    assert results["good"].folder is not None and math.isfinite(results["good"].loss)


def test_the_memory_of_a_job_that_ended_is_free_before_the_next_step(
    base: BaseModel, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine plans without it."""
    added: list[weakref.ref[LiveJob]] = []
    admit, micro_batch = TrainEngine.admit, TrainEngine.micro_batch

    def admitting(engine: TrainEngine, prepared: PreparedJob) -> LiveJob:
        live = admit(engine, prepared)
        added.append(weakref.ref(live))
        return live

    def stepping(engine: TrainEngine) -> object:
        assert sum(live() is not None for live in added) == len(engine.live)
        return micro_batch(engine)

    monkeypatch.setattr(TrainEngine, "admit", admitting)
    monkeypatch.setattr(TrainEngine, "micro_batch", stepping)
    jobs = [TrainJob(name, dataset, train=SHORT.model_copy(update={"epochs": 3 - n})) for n, name in enumerate("abc")]
    assert all(result.folder for result in lora_core.train(base, jobs, tmp_path / "out").values())


def test_rows_longer_than_the_models_positions_are_refused(dataset: Path, tmp_path: Path) -> None:
    """GPT-2's table ends there, and an index past it would end every job."""
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "word " * 80}) + "\n")
    base = load_base(str(save_tiny_model("gpt2", tmp_path / "gpt2")), precision="fp32", cache_dir=tmp_path / "cache")
    jobs = [TrainJob("long", long), TrainJob("held", dataset, validation=long), TrainJob("fits", dataset, train=SHORT)]
    with pytest.raises(TrainJobsError) as caught:
        lora_core.train(base, jobs, tmp_path / "out")
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["long", "held"]
    assert "and this base model 128 positions: set max_seq_len to 128 or less" in str(caught.value)
    cut = TrainConfig(max_seq_len=128, epochs=1)
    result = lora_core.train(base, [TrainJob("cut", long, train=cut)], tmp_path / "out")["cut"]
    assert result.folder is not None


def test_tokens_without_a_row_in_the_embedding_end_nothing_that_trains(
    base: BaseModel, dataset: Path, tmp_path: Path
) -> None:
    """They are refused before, with all else, validation ones too."""
    base = replace(base, tokenizer=with_more_tokens(base.tokenizer))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": "what is <|more|>?"}\n')
    jobs = [TrainJob("good", dataset, train=SHORT), TrainJob("bad", bad), TrainJob("held", dataset, validation=bad)]
    with pytest.raises(TrainJobsError) as caught:
        lora_core.train(base, jobs, tmp_path / "out")
    assert [problem.split(" the token")[0] for problem in caught.value.problems] == [
        "bad: line 2:", "held: validation: line 2:",
    ]  # fmt: skip
    assert "`<|more|>` has the id 264, and the base model's embedding 264 rows" in caught.value.problems[0]
    assert not (tmp_path / "out" / "good").exists()


def test_files_that_cannot_be_written_are_that_jobs_error(base: BaseModel, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("in the way")
    results = lora_core.train(base, [TrainJob(name, dataset, train=SHORT) for name in "ab"], tmp_path / "out")
    assert results["a"].folder is None and "could not be written" in str(results["a"].error)
    assert results["b"].folder is not None


def test_every_mistake_is_told_before_anything_trains(
    base: BaseModel, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_step(_: object) -> Tensor:
        raise AssertionError("it trained")

    monkeypatch.setattr("lora_core.training.engine.TrainEngine.step", no_step)
    (tmp_path / "bad.jsonl").write_text('{"prompt": 1, "completion": "x"}\nno json\n')
    (tmp_path / "file").write_text("")
    jobs = [
        TrainJob("twice", dataset),
        TrainJob("twice", dataset),
        TrainJob("../up", dataset),
        TrainJob("missing", tmp_path / "none.jsonl"),
        TrainJob("bad", tmp_path / "bad.jsonl"),
        TrainJob("targets", dataset, LoraConfig(target_modules=["nothing_proj"], rank_pattern={"absent": 2})),
    ]
    with pytest.raises(TrainJobsError) as caught:
        lora_core.train(base, jobs, tmp_path / "file" / "out")
    message = str(caught.value)
    for part in (
        "2 jobs are named 'twice'",
        "job name '../up' cannot be a folder's",
        "missing: dataset",
        "bad: line 1",
        "bad: line 2",
        "targets: target_modules: 'nothing_proj' matches no module",
        "targets: rank_pattern",
        "out: nothing can be written",
    ):
        assert part in message, message


def test_what_became_of_the_rows_is_in_the_result_and_the_log(
    base: BaseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the service says it when a job is submitted."""
    rows = [{"prompt": f"{n} = ", "completion": "c" * n, "id": n} for n in (1, 2, 40, 3)]
    rows += [{"prompt": "p" * 30, "completion": "never seen", "id": 0}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.csv").write_text("prompt,completion,note\na,b,\nc," + "d" * 50 + ",")
    config = SHORT.model_copy(update={"max_seq_len": 20})
    jobs = [
        TrainJob("cut", tmp_path / "a.jsonl", train=config, validation=tmp_path / "b.csv"),
        TrainJob("dropped", tmp_path / "a.jsonl", train=config.model_copy(update={"overlong": "drop"})),
        TrainJob("split", tmp_path / "a.jsonl", train=config, validation=0.3),
    ]
    with caplog.at_level("INFO", logger="lora.library"):
        results = lora_core.train(base, jobs, tmp_path / "out")
    cut, held_out, dropped = results["cut"].dataset, results["cut"].validation, results["dropped"].dataset
    assert held_out is not None and results["dropped"].validation is None
    overlong = "2 rows longer than max_seq_len=20 tokens"
    unlabelled = "rows without a supervised token: lines"
    assert cut.losses() == [f"{overlong}: truncated", f"1 {unlabelled} 5", "ignored columns: id"]
    assert dropped.losses() == [f"{overlong}: dropped", f"2 {unlabelled} 3, 5", "ignored columns: id"]
    assert held_out.losses() == ["1 rows longer than max_seq_len=20 tokens: truncated", "ignored columns: note"]
    assert (cut.rows, cut.examples, dropped.examples, held_out.rows) == (5, 4, 3, 2)
    assert cut.lines() == cut.contents() + cut.losses()
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for name, title, report in (
        ("cut", "dataset", cut), ("cut", "validation", held_out), ("dropped", "dataset", dropped)
    ):  # fmt: skip
        assert f"job={name} event={title} contents={'; '.join(report.contents())!r}" in caplog.messages
        assert {f"job={name} event={title} loss={loss!r}" for loss in report.losses()} <= {*warned}
    assert sum("job=split" in message and "ignored columns" in message for message in warned) == 1
    parts = results["split"].dataset, results["split"].validation
    assert sum(part.rows for part in parts if part is not None) == 5


def test_the_packages_names_are_there_and_others_are_not() -> None:
    assert all(getattr(lora_core, name) is not None for name in lora_core.__all__)
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = lora_core.absent


# --- validation rows -------------------------------------------------------------------------------------------------

# A constant rate far too high: the loss of what is held out falls, then rises.
OVERFITS = SHORT.model_copy(update={"epochs": 6, "learning_rate": 0.05, "lr_scheduler": "constant", "eval_steps": 1})


def test_a_fraction_holds_out_what_a_second_file_with_the_same_rows_does(
    base: BaseModel, dataset: Path, tmp_path: Path
) -> None:
    """And neither is trained on: ten rows less three are two steps an epoch, not three."""
    rows = dataset.read_text().splitlines(keepends=True)
    kept, held_out = split(10, 0.3, SHORT.seed)
    for name, indices in (("kept", kept), ("held_out", held_out)):
        (tmp_path / f"{name}.jsonl").write_text("".join(rows[index] for index in indices))
    jobs = [
        TrainJob("fraction", dataset, train=SHORT, validation=0.3),
        TrainJob("file", tmp_path / "kept.jsonl", train=SHORT, validation=tmp_path / "held_out.jsonl"),
        TrainJob("none", dataset, train=SHORT),
    ]
    results = lora_core.train(base, jobs, tmp_path / "out")
    fraction, file, none = (results[job.name] for job in jobs)
    assert replace(fraction, folder=None) == replace(file, folder=None)
    assert (fraction.steps, none.steps) == (4, 6)
    assert fraction.evaluation is not None and fraction.best is not None
    assert (none.evaluation, none.best) == (None, None)
    assert fraction.evaluation.step == 4
    assert fraction.evaluation.tokens == sum(len(json.loads(rows[i])["completion"]) + 1 for i in held_out)


def test_the_best_weights_are_what_is_written_where_that_is_asked_for(
    base: BaseModel, dataset: Path, tmp_path: Path
) -> None:
    best_config = OVERFITS.model_copy(update={"load_best_model_at_end": True})
    jobs = [
        TrainJob("last", dataset, train=OVERFITS, validation=0.3),
        TrainJob("best", dataset, train=best_config, validation=0.3),
    ]
    results = lora_core.train(base, jobs, tmp_path / "out")
    last, best = results["last"], results["best"]
    assert last.best == best.best and last.evaluation == best.evaluation
    assert best.best is not None and best.evaluation is not None and best.folder is not None
    assert best.best.step < best.evaluation.step == best.steps == 12
    assert best.best.loss < best.evaluation.loss
    again = TrainJob(
        "again", dataset, train=SHORT.model_copy(update={"learning_rate": 1e-30}), validation=0.3,
        init_adapter=best.folder,
    )  # fmt: skip
    found = lora_core.train(base, [again], tmp_path / "again")["again"].evaluation
    assert found is not None and found.loss == pytest.approx(best.best.loss, rel=1e-5)


def test_a_job_that_stops_early_says_why_and_has_its_best_weights(
    base: BaseModel, dataset: Path, tmp_path: Path
) -> None:
    jobs = [
        TrainJob("patient", dataset, train=OVERFITS, validation=0.3),
        TrainJob(
            "stops",
            dataset,
            train=OVERFITS.model_copy(update={"early_stopping_patience": 1}),
            validation=0.3,
        ),
    ]
    results = lora_core.train(base, jobs, tmp_path / "out")
    stops = results["stops"]
    assert results["patient"].stopped is None
    assert stops.error is None and stops.stopped is not None and "did not improve" in stops.stopped
    assert stops.steps < results["patient"].steps
    assert stops.best is not None and stops.best.step == stops.steps - 1


def test_mistakes_about_validation_rows_are_told(base: BaseModel, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("no json\n")
    jobs = [
        TrainJob("half", dataset, validation=0.5),
        TrainJob("one", dataset, validation=1),
        TrainJob("missing", dataset, validation=tmp_path / "none.jsonl"),
        TrainJob("bad", tmp_path / "bad.jsonl", validation=tmp_path / "none.jsonl"),
        TrainJob("without", dataset, train=OVERFITS),
    ]
    with pytest.raises(TrainJobsError) as caught:
        lora_core.train(base, jobs, tmp_path / "out")
    message = str(caught.value)
    for part in (
        "half: validation must be a fraction of the rows above 0 and below 0.5, or a second file, not 0.5",
        "one: validation must be a fraction of the rows above 0 and below 0.5, or a second file, not 1",
        f"missing: validation: dataset {tmp_path / 'none.jsonl'}: there is no such file",
        "bad: line 1",
        "bad: validation: dataset",
        "without has no validation examples, which eval_steps",
    ):
        assert part in message, message


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As an interrupt would be: no handler for errors takes it."""


@contextmanager
def steps_of(most: int = 1000) -> Iterator[list[str]]:
    """The names of the jobs that step from here on; training ends after so many calls of `step`."""
    step, stepped = TrainEngine.step, list[str]()
    calls = iter(range(most))

    def stepping(engine: TrainEngine) -> object:
        if next(calls, None) is None:
            raise Killed
        outcomes = step(engine)
        stepped.extend(outcomes)
        return outcomes

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainEngine, "step", stepping)
        yield stepped


def train_killed(base: BaseModel, jobs: list[TrainJob], out: Path, most: int, **options: Any) -> list[str]:
    with steps_of(most) as stepped, pytest.raises(Killed):
        lora_core.train(base, jobs, out, **options)
    return stepped


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resumed_jobs_are_those_that_were_never_interrupted(base: BaseModel, dataset: Path, tmp_path: Path) -> None:
    """Killed twice: while all train, and when one has ended."""
    evaluated = SHORT.model_copy(update={"epochs": 4, "eval_steps": 2})
    jobs = [
        TrainJob("evaluated", dataset, LoraConfig(r=4, lora_dropout=0.1), evaluated, validation=0.3),
        TrainJob("short", dataset, LoraConfig(r=2), SHORT),
        TrainJob("long", dataset, LoraConfig(r=2), SHORT.model_copy(update={"epochs": 5, "seed": 1})),
    ]
    whole = lora_core.train(base, jobs, tmp_path / "whole", checkpoint_seconds=None)
    trained = list[str]()
    for resume in (False, True):
        trained += train_killed(base, jobs, tmp_path / "out", 6, resume=resume, checkpoint_seconds=0)
    assert (tmp_path / "out" / "short").exists() and not (tmp_path / "out" / "long").exists()
    (tmp_path / "out" / ".checkpoints" / "long.partial").write_bytes(b"killed while it was written")
    with steps_of() as stepped:
        found = lora_core.train(base, jobs, tmp_path / "out", resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")  # and no checkpoint is left
    assert [replace(one, folder=None) for one in found.values()] == [
        replace(one, folder=None) for one in whole.values()
    ]
    assert not (tmp_path / "out" / ".checkpoints").exists()
    assert "short" not in stepped and 0 < stepped.count("long") < whole["long"].steps
    assert len(trained + stepped) < 2 * sum(result.steps for result in whole.values())


def test_a_call_in_which_a_job_failed_is_resumed_without_training_the_others(
    base: BaseModel, dataset: Path, tmp_path: Path
) -> None:
    wild = SHORT.model_copy(update={"learning_rate": 1e30, "max_grad_norm": 1e30})
    good, tame = TrainJob("good", dataset, train=SHORT), TrainJob("wild", dataset, train=SHORT)
    first = lora_core.train(base, [replace(tame, train=wild), good], tmp_path / "out", checkpoint_seconds=0)
    assert first["wild"].error is not None
    with steps_of() as stepped:
        second = lora_core.train(base, [good, tame], tmp_path / "out", resume=True)
    assert second["good"] == first["good"] and second["wild"].error is None
    assert set(stepped) == {"wild"}


def test_a_checkpoint_of_something_else_is_refused_and_stays(base: BaseModel, dataset: Path, tmp_path: Path) -> None:
    jobs = [TrainJob("a", dataset, train=SHORT), TrainJob("b", dataset, train=SHORT)]
    train_killed(base, jobs, tmp_path / "out", 4, checkpoint_seconds=0)
    left = files(tmp_path / "out")
    other = SHORT.model_copy(update={"learning_rate": 1e-4})
    with pytest.raises(
        TrainJobsError, match=r"a: the checkpoint is not one of a: its lora .* or remove .*/a.safetensors"
    ):
        lora_core.train(base, [replace(jobs[0], train=other), jobs[1]], tmp_path / "out", resume=True)
    with pytest.raises(TrainJobsError, match=r"a.safetensors is of another base or precision"):
        lora_core.train(replace(base, fingerprint="f" * 64), jobs, tmp_path / "out", resume=True)
    with pytest.raises(TrainJobsError, match="there are no jobs"):
        lora_core.train(base, [], tmp_path / "out")
    assert files(tmp_path / "out") == left
    lora_core.train(base, [replace(jobs[0], name="c")], tmp_path / "out")  # and other jobs' stay
    assert left.items() <= files(tmp_path / "out").items()
    (tmp_path / "out" / ".checkpoints" / "b.safetensors").write_bytes(b"cut")
    with pytest.raises(TrainJobsError, match=r"b: the checkpoint .*b.safetensors cannot be read"):
        lora_core.train(base, jobs, tmp_path / "out", resume=True)
    changed = [replace(job, train=other) for job in jobs]
    train_killed(base, changed, tmp_path / "out", 1)  # anew, and nothing was written yet
    with steps_of() as stepped:
        results = lora_core.train(base, changed, tmp_path / "out", resume=True)
    assert stepped.count("a") == stepped.count("b") == results["a"].steps


def test_resumed_on_another_day_rows_are_what_they_became_on_the_first(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the chat template says by then, but not if the files are others: that is another data set."""
    dataset = tmp_path / "chats.jsonl"
    write = lambda *names: dataset.write_text("".join(json.dumps(chat(f"Hi {name}", "Yo.")) + "\n" for name in names))  # noqa: E731
    write(*"abcdefgh")
    base.tokenizer.chat_template = DATED_TEMPLATE
    jobs = [TrainJob("a", dataset, train=SHORT), TrainJob("b", dataset, train=SHORT, validation=0.3)]
    clock_says(monkeypatch, "31 Dec")
    whole = lora_core.train(base, jobs, tmp_path / "whole", checkpoint_seconds=None)
    train_killed(base, jobs, tmp_path / "out", 2, checkpoint_seconds=0)
    left = files(tmp_path / "out")
    assert {Path(name).name for name in left} == {
        f"{name}.{kind}" for name in "ab" for kind in ("safetensors", "encoded")
    }
    clock_says(monkeypatch, "01 Jan")
    base.tokenizer.chat_template = f"Of today, {DATED_TEMPLATE}"
    other_part = [jobs[0], replace(jobs[1], validation=0.4)]
    with pytest.raises(TrainJobsError, match=r"^b: the checkpoint is not one of b: .* rows"):
        lora_core.train(base, other_part, tmp_path / "out", resume=True)
    write(*"abcdefgx")
    with pytest.raises(TrainJobsError, match=r"a: the checkpoint is not one of a: .*\n.*b: the checkpoint is not one"):
        lora_core.train(base, jobs, tmp_path / "out", resume=True)
    assert files(tmp_path / "out") == left
    write(*"abcdefgh")
    found = lora_core.train(base, jobs, tmp_path / "out", resume=True)
    assert [replace(one, folder=None) for one in found.values()] == [
        replace(one, folder=None) for one in whole.values()
    ]
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_how_often_checkpoints_are_written_is_what_is_asked_for(
    base: BaseModel, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr("lora_core.training.optimizer.Snapshot.write", lambda _, path: written.append(path.stem))
    jobs = [TrainJob(name, dataset, train=SHORT.model_copy(update={"epochs": 10})) for name in "ab"]
    for seconds, fewest, most in ((None, 0, 0), (3600.0, 2, 2), (0.0, 10, 62)):
        written.clear()
        lora_core.train(base, jobs, tmp_path / "out", checkpoint_seconds=seconds)
        assert fewest <= len(written) <= most
        assert seconds is None or set(written) == {"a", "b"}
        assert abs(written.count("a") - written.count("b")) <= 2
