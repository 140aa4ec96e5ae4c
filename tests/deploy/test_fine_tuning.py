"""OpenAI's client against the API of jobs and models: what it sends is a job, and what it reads is of its own types."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types import FileObject, Model
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from cluster.adapter_lifecycle import delete_adapter
from cluster.storage.base import StorageUnavailable
from deploy.api.job_requests import WINDOW_SECONDS
from jobs.job import EventKind, JobSteps, StepMetrics
from jobs.store.api_keys import Scope
from tests.support.api_site import FIGURES, Site, running_site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("site")) as site:
        yield site


def refused(site: Site, **sent: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        site.create(**{"suffix": "a", **sent})
    assert caught.value.response.headers["x-should-retry"] == "false"
    return caught.value


def test_a_job_from_its_creation_to_an_answer_of_its_model(site: Site) -> None:
    file = site.client.files.create(file=site.rows, purpose="fine-tune").id
    hyperparameters: Any = {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5}
    job = site.create(
        "triage",
        training_file=file,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        seed=7,
        metadata={"team": "a b", "Größe": "ü"},
        extra_body={"lora": {"r": 4}, "train": {"max_seq_len": 64}},
    )
    FineTuningJob.model_validate(job.to_dict(), strict=True)
    assert job.training_file == file
    spec = site.queue.get(job.id).spec
    assert (spec.train.epochs, spec.train.batch_size, spec.train.learning_rate, spec.train.seed) == (2, 8, 1e-4, 7)
    assert (spec.lora.r, spec.train.max_seq_len, spec.adapter, spec.base_model) == (4, 64, "triage", "tiny")
    assert (job.status, job.model, job.seed) == ("queued", "tiny", 7)
    assert job.hyperparameters.learning_rate_multiplier == 0.5 and job.metadata == {"team": "a b", "Größe": "ü"}
    own: Any = job.to_dict()
    assert (own["lora"], own["train"]) == (spec.lora.model_dump(mode="json"), spec.train.model_dump(mode="json"))
    assert (own["precision"], own["num_workers"], own["priority"], own["requested"]) == ("auto", 1, 0, None)
    assert job.fine_tuned_model is None and job.result_files == [] and job.organization_id == "acme"

    digest = site.train(job.id)
    done = site.client.fine_tuning.jobs.retrieve(job.id)
    FineTuningJob.model_validate(done.to_dict(), strict=True)
    assert (done.status, done.fine_tuned_model, done.trained_tokens) == ("succeeded", "tiny:triage@1", 600)
    assert done.finished_at and done.estimated_finish is None and done.error is None
    events = list(site.client.fine_tuning.jobs.list_events(job.id, limit=2))
    for event in events:
        FineTuningJobEvent.model_validate(event.to_dict(), strict=True)
    submitted, assigned, early, late, odd, published = [f"ftevent-{event.id}" for event in site.queue.events(job.id)]
    assert [event.id for event in events] == [
        published, f"{odd}-6", odd, late, early, f"{assigned}-4", f"{assigned}-2", assigned, submitted
    ]  # fmt: skip
    assert events[0].message == "published"
    last = {"step": 6, "train_loss": 0.5, "valid_loss": 0.75, "valid_mean_token_accuracy": 0.5}
    assert (events[1].type, events[1].message, events[1].data) == ("metrics", "Step 6: training loss=0.5000", last)
    assert events[2].data == {"figures": [None, 1]}, "JSON has no infinity"
    curve = site.client.get(f"/fine_tuning/jobs/{job.id}/metrics?after_step=2", cast_to=object)["data"]  # type: ignore[index]
    assert curve == [event.to_dict() for event in (events[5], events[1])]
    with pytest.raises(openai.BadRequestError, match="after must be the id of an event"):
        site.client.fine_tuning.jobs.list_events(job.id, after="ftevent-1-x")
    checkpoints = list(site.client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    for checkpoint in checkpoints:
        FineTuningJobCheckpoint.model_validate(checkpoint.to_dict(), strict=True)
        name = checkpoint.fine_tuned_model_checkpoint
        site.client.chat.completions.create(model=name, messages=[{"role": "user", "content": "Hi"}])
        kept = site.client.models.retrieve(name).to_dict()
        assert site.base.asked is not None and kept["digest"] == site.base.asked.digest and kept["version"] is None
    assert [(one.step_number, one.metrics.train_loss, one.metrics.valid_loss) for one in checkpoints] == [
        (4, 0.5, None), (2, 0.5, None)
    ]  # fmt: skip
    (file,) = done.result_files
    FileObject.model_validate(site.client.files.retrieve(file).to_dict(), strict=True)
    rows = list(csv.DictReader(site.client.files.content(file).text.splitlines()))
    assert [(row["step"], row["train_loss"], row["valid_loss"]) for row in rows] == [
        ("2", "1.5", ""), ("4", "0.75", ""), ("6", "0.5", "0.75")
    ]  # fmt: skip

    answer = site.client.chat.completions.create(
        model=str(done.fine_tuned_model), messages=[{"role": "user", "content": "Hi"}]
    )
    assert answer.choices[0].message.content == "hello"
    model = site.client.models.retrieve(str(done.fine_tuned_model))
    Model.model_validate(model.to_dict(), strict=True)
    lineage = {"job": job.id, "base_fingerprint": "f", "metrics": FIGURES, "version": 1, "digest": digest}
    assert model.to_dict().items() >= lineage.items() and len(model.to_dict()["dataset_sha256"]) == 64  # type: ignore[arg-type]
    with pytest.raises(openai.ConflictError, match="is succeeded and cannot become cancelled"):
        site.client.fine_tuning.jobs.cancel(job.id)


def test_the_same_request_is_the_same_job(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    first = site.create("once")
    assert site.create("once").id == first.id != site.create("twice").id
    keyed = site.create("once", {"Idempotency-Key": "k1"})
    assert site.create("once", {"Idempotency-Key": "k1"}).id == keyed.id != first.id
    assert site.create("once", {"Idempotency-Key": "k2"}).id not in (first.id, keyed.id)
    site.client.fine_tuning.jobs.cancel(keyed.id)
    assert site.create("once", {"Idempotency-Key": "k1"}).status == "cancelled", "a key is for one job for ever"
    error = refused(site, suffix="other", headers={"Idempotency-Key": "k1"})
    assert (error.status_code, error.code) == (409, "idempotency_key_reused") and keyed.id in error.message
    monkeypatch.setattr(site.gateway._fine_tuning._queue, "_clock", lambda: time.time() + WINDOW_SECONDS)
    later = site.create("once")
    assert later.id not in (first.id, keyed.id) and site.create("once").id == later.id


def test_a_job_learns_from_preferences(site: Site) -> None:
    """In OpenAI's format, by its hyperparameters; rows of another kind are refused."""
    messages = [{"role": "user", "content": "Hi"}]
    sides = [[{"role": "assistant", "content": text}] for text in ("Hello!", "What?")]
    row = {"input": {"messages": messages}, "preferred_output": sides[0], "non_preferred_output": sides[1]}
    content = "\n".join([json.dumps(row)] * 4).encode()
    file = site.client.files.create(file=("pairs.jsonl", content), purpose="fine-tune")
    dpo: Any = {
        "type": "dpo",
        "dpo": {"hyperparameters": {"beta": 0.3, "batch_size": 2, "learning_rate_multiplier": 0.5}},
    }
    job = site.create("liked", training_file=file.id, method=dpo)
    FineTuningJob.model_validate(job.to_dict(), strict=True)
    train = site.queue.get(job.id).spec.train
    assert (train.method, train.beta, train.batch_size, train.learning_rate) == ("dpo", 0.3, 2, 1e-5)
    assert job.method is not None and job.method.dpo is not None and job.method.dpo.hyperparameters is not None
    assert job.method.dpo.hyperparameters.to_dict() == {"n_epochs": 3, **dpo["dpo"]["hyperparameters"]}
    auto = site.create(
        "auto", training_file=file.id, method={"type": "dpo", "dpo": {"hyperparameters": {"beta": "auto"}}}
    )
    assert auto.method is not None and auto.method.dpo is not None and auto.method.dpo.hyperparameters is not None
    assert auto.method.dpo.hyperparameters.beta == 0.1 and site.queue.get(auto.id).spec.train.learning_rate == 2e-5
    estimate = site.create("dry", training_file=file.id, method=dpo, extra_body={"dry_run": True}).to_dict()
    assert (estimate["steps"], estimate["examples"]) == (6, 4)

    fence = site.start(job.id)
    figures = {"train_loss": 0.69, "train_reward_accuracy": 0.5, "train_reward_margin": 0.1, "valid_loss": 0.6,
               "valid_reward_accuracy": 0.75, "valid_reward_margin": 0.25}  # fmt: skip
    progress: Any = FIGURES | {"steps": 8, "tokens_per_second": 100.0}
    site.queue.record_steps(*fence, [JobSteps(job.id, progress, (StepMetrics(1, 1001.0, figures),))])
    kept = {"model": "tiny:liked@0", "metrics": FIGURES | {"reward_margin": 0.1, "validation_accuracy": 0.75}}
    site.queue.log(job.id, "kept", kind=EventKind.CHECKPOINT, data=kept)
    (checkpoint,) = site.client.fine_tuning.jobs.checkpoints.list(job.id)
    FineTuningJobCheckpoint.model_validate(checkpoint.to_dict(), strict=True)
    told = checkpoint.metrics.to_dict()
    assert told["valid_reward_accuracy"] == 0.75 and "valid_mean_token_accuracy" not in told
    site.train(job.id, fence)
    (result,) = site.client.fine_tuning.jobs.retrieve(job.id).result_files
    first = next(csv.DictReader(site.client.files.content(result).text.splitlines()))
    assert {name: float(text) for name, text in first.items() if text} == {"step": 1} | figures

    error = refused(site, method=dpo, extra_body={"train": {"method": "dpo", "beta": 1.0}})
    assert "method.type and train.method are both given; give one" in error.message
    assert "method.dpo.hyperparameters.beta and train.beta are both given" in error.message
    error = refused(site, method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}})
    assert error.param == "method.dpo.hyperparameters.beta" and "beta must be more than 0" in error.message
    error = refused(site, method={"type": "dpo"})
    assert "training_file: line 1: column `prompt`, `completion`: prompt/completion is what method" in error.message
    assert "learns from; set train.method to it" in refused(site, training_file=file.id).message


def test_a_job_is_paused_resumed_and_cancelled(site: Site) -> None:
    jobs, job = site.client.fine_tuning.jobs, site.create("moves")
    assert [jobs.pause(job.id).status, jobs.resume(job.id).status] == ["paused", "queued"]
    site.start(job.id)
    asked: Any = jobs.pause(job.id).to_dict()
    assert (asked["status"], asked["requested"], site.queue.get(job.id).requested) == ("running", "pause", "pause")
    assert jobs.resume(job.id).status == "running" and site.queue.get(job.id).requested is None
    waiting = site.create("waits")
    assert [jobs.cancel(waiting.id).status, jobs.cancel(waiting.id).status] == ["cancelled", "cancelled"]
    with pytest.raises(openai.ConflictError, match="is cancelled and cannot become queued"):
        jobs.resume(waiting.id)
    then: Any = site.create("then", extra_body={"depends_on": [job.id], "time_limit": "90m"}).to_dict()
    assert (then["depends_on"], then["time_limit"]) == ([job.id], 5400.0)
    assert site.queue.get(then["id"]).not_before == math.inf


def test_a_job_that_is_in_the_queue_is_scheduled_though_storage_is_away(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise StorageUnavailable("503")

    started: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(site.gateway._fine_tuning, "_start_scheduler", started.append)
        patch.setattr("jobs.admitted.Admitted.record", away)
        with pytest.raises(openai.InternalServerError, match="503"):
            site.create("unrecorded")
    (job,) = (job for job in site.queue.list() if job.adapter == "unrecorded")
    assert started == ["c"] and site.create("unrecorded").id == job.id


def test_a_sweep_is_one_job_with_its_trials(site: Site) -> None:
    sweep = {"learning_rate": [1e-4, 3e-4], "r": [4, 8], "reduction_factor": 2}
    options: Any = {"validation_file": str(site.rows), "extra_body": {"sweep": sweep}}
    estimate = site.create("swept", **options | {"extra_body": {"sweep": sweep, "dry_run": True}}).to_dict()
    told: Any = estimate["sweep"]
    assert (told["trials"], told["left"]) == (4, [2, 1]) and told["grid_tokens"] == 12 * estimate["tokens_per_epoch"]  # type: ignore[operator]
    assert estimate["tokens"] < told["grid_tokens"]
    job = site.create("swept", **options)
    FineTuningJob.model_validate(job.to_dict(), strict=True)
    shown: Any = site.client.fine_tuning.jobs.retrieve(job.id).to_dict()["sweep"]
    assert shown["options"] == sweep and [one["values"]["r"] for one in shown["trials"]] == [4, 4, 8, 8]
    assert shown["trials"][0] | {"values": {}} == {
        "id": f"{job.id}-1", "status": "queued", "values": {}, "step": 0, "steps": 6, "valid_loss": None, "rung": 0,
        "standing": "",
    }  # fmt: skip
    listed = [one.to_dict() for one in site.client.fine_tuning.jobs.list(limit=100)]
    assert [one["sweep"] for one in listed if str(one["id"]).startswith(job.id)] == [shown]
    assert site.create("swept", **options).id == job.id
    assert site.client.fine_tuning.jobs.retrieve(f"{job.id}-2").to_dict()["sweep"] is None
    site.client.fine_tuning.jobs.cancel(job.id)
    ended: Any = site.client.fine_tuning.jobs.retrieve(job.id).to_dict()
    assert {ended["status"], *(one["status"] for one in ended["sweep"]["trials"])} == {"cancelled"}
    error = refused(site, extra_body={"sweep": {"r": [0], "learning_rate": 3}})
    for part in ("sweep.r[0] must be at least 1", "sweep.learning_rate must be a list"):
        assert part in error.message
    error = refused(site, extra_body={"sweep": {"r": [4]}})
    assert "sweep compares its trials by their validation loss" in error.message


def test_jobs_are_listed_by_metadata_in_pages(site: Site) -> None:
    labels: list[Any] = [{"run": "1", "kind": "x"}, {"run": "2", "kind": "x"}, {"run": "1", "kind": 'y"]'}, None]
    ids = [site.create(f"listed-{n}", metadata=pairs).id for n, pairs in enumerate(labels)]

    def listed(**options: Any) -> list[str]:
        return [job.id for job in site.client.fine_tuning.jobs.list(**options) if job.id in ids]

    assert listed(limit=1) == ids[::-1]
    assert listed(metadata={"run": "1"}) == [ids[2], ids[0]] and listed(metadata={"kind": 'y"]'}) == [ids[2]]
    assert listed(metadata={"run": "1", "kind": "x"}, limit=1) == [ids[0]]
    assert listed(extra_query={"metadata": "null"}) == [ids[3]]
    for query, param in (({"limit": 0}, "limit"), ({"after": "job-none"}, "fine_tuning_job_id")):
        with pytest.raises(openai.APIStatusError) as caught:
            site.client.fine_tuning.jobs.list(extra_query=query)
        assert caught.value.param == param
    with pytest.raises(openai.BadRequestError, match="after must be the id of an event"):
        site.client.fine_tuning.jobs.list_events(ids[0], after="x")


def test_everything_wrong_is_said_at_once(site: Site) -> None:
    slow = {
        "target_modules": ".*.*", "rank_pattern": {"q_proj": 1, "(q|k)_proj": 1, "v" * 300: 1},
        "alpha_pattern": {f"layers.{number}": 1.0 for number in range(129)},
    }  # fmt: skip
    error = refused(
        site, model="huge", suffix="No Spaces", training_file="rows.jsonl", validation_file=3, seed="x",
        hyperparameters={"n_epochs": 0, "batch_sizes": 3}, metadata={"a": 1}, integrations=[{"type": "wandb"}],
        method={"type": "reinforcement", "dpo": {}},
        extra_body={"num_workers": 0, "lora": {"rank": 3} | slow, "prioritty": 1, "validation": "x"},
    )  # fmt: skip
    for part in (
        "the model 'huge' cannot be trained; there are: tiny", "suffix must be 1 to 64 lower-case",
        "training_file: give the id of an uploaded file", "validation_file: give the id", "seed must be a whole number",
        "hyperparameters.n_epochs must be at least 1", "hyperparameters.batch_sizes is no parameter",
        "metadata must be at most 16 pairs", "integrations is not supported", "method.type must be supervised or dpo,",
        "method.dpo does not go with the type supervised; leave it out, or set method.type",
        "num_workers must be at least 1", "unknown key 'lora.rank'", "did you mean priority?",
        "validation must be a fraction", r"lora.target_modules has '.*.*': write names, '.', '|' and '\d' or '\d+',",
        "lora.rank_pattern has '(q|k)_proj': write", "lora.alpha_pattern has 'layers.0': write", "at most 128 of them",
    ):  # fmt: skip
        assert part in error.message, (part, error.message)
    assert (error.status_code, error.type) == (400, "invalid_request_error")
    error = refused(site, training_file="/no/such", extra_body={"num_workers": 3, "depends_on": ["job-0"]})
    assert "depends_on: there is no job 'job-0'" in error.message and error.param == "depends_on"
    assert "num_workers is 3, but" in error.message and "training_file: /no/such is not a file" in error.message
    file = site.client.files.create(file=site.rows, purpose="fine-tune").id
    site.registry.storage.delete(f"files/acme/{file}.jsonl")
    error = refused(site, model="tiny:nothing", training_file=file)
    assert f"training_file: {file} is not a file" in error.message and "dataset" not in error.message
    assert error.param == "training_file" and "; model: there is no adapter tiny:nothing" in error.message
    for name in ("a" * 300, "a/.."):
        assert f"init_adapter: there is no adapter tiny:{name}" in refused(
            site, extra_body={"init_adapter": f"tiny:{name}"}
        ).message  # fmt: skip


def test_a_dry_run_says_what_a_job_comes_to(site: Site) -> None:
    before = len(site.queue.list())
    plain = {"target_modules": r"model.layers\.\d+\.self_attn.*", "rank_pattern": {r"q_proj|\d+\..*k_proj": 3}}
    estimate = site.create("dry", extra_body={"dry_run": True, "priority": 1000, "lora": plain}).to_dict()
    assert estimate["steps"] == 6 and estimate["examples"] == 10 and estimate["queue"] == {"before": 0}
    assert estimate["tokens"] == 3 * estimate["tokens_per_epoch"] > 0  # type: ignore[operator]
    assert estimate["supervised_tokens"] == 3 * estimate["supervised_tokens_per_epoch"]  # type: ignore[operator]
    assert estimate["seconds"] is estimate["tokens_per_second"] is None, "nothing was measured here"
    memory: Any = estimate["memory"]
    assert memory["device"] == "cpu" and 0 < memory["least_bytes"] <= memory["bytes"]
    assert len(site.queue.list()) == before


def test_models_are_promoted_rolled_back_and_deleted(site: Site) -> None:
    for loss in (0.5, 0.7):
        site.registry.publish(
            "tiny", "moving", {"weights": str(loss).encode()}, {"metrics": {"loss": loss, "worst": math.nan}}
        )

    def post(path: str, **body: Any) -> Any:
        return site.client.post(f"/models/{path}", body=body, cast_to=object)

    gates = [{"metric": "loss", "max": 0.6}]
    assert post("tiny:moving@1/promote", alias="prod", gates=gates)["version"] == 1
    with pytest.raises(openai.ConflictError, match=r"its loss is 0\.7, which has to be at most 0\.6"):
        post("tiny:moving@2/promote", alias="prod")
    post("tiny:moving@2/promote", alias="prod", gates=[])
    assert post("tiny:moving@prod/rollback") == {
        "id": "tiny:moving@prod", "object": "model.alias", "version": 1,
        "digest": site.registry.digest("tiny", "moving", "1"),
    }  # fmt: skip
    versions: Any = site.client.get("/models/tiny:moving/versions", cast_to=object)
    assert [(one["id"], one["version"], one["aliases"], one["metrics"]["loss"]) for one in versions["data"]] == [
        ("tiny:moving@2", 2, ["latest"], 0.7), ("tiny:moving@1", 1, ["prod"], 0.5)
    ]  # fmt: skip
    (listed,) = [model.to_dict() for model in site.client.models.list() if model.id == "tiny:moving"]
    assert (listed["version"], listed["aliases"], listed["metrics"]) == (2, {"prod": 1}, {"loss": 0.7, "worst": None})
    for model, reason in (("tiny:moving@1", "it is prod"), ("tiny:moving@latest", "cannot be deleted"),
                          ("tiny:moving", "there is tiny:moving@prod")):  # fmt: skip
        with pytest.raises(openai.ConflictError, match=reason) as caught:
            site.client.models.delete(model)
        assert caught.value.response.headers["x-should-retry"] == "false"
    for model in ("tiny:moving@prod", "tiny:moving@1", "tiny:moving"):
        assert site.client.models.delete(model).to_dict() == {"id": model, "object": "model", "deleted": True}
        with pytest.raises(openai.NotFoundError):
            site.client.models.delete(model)
    with pytest.raises(openai.PermissionDeniedError, match="tiny is a base model"):
        site.client.models.delete("tiny")
    with pytest.raises(openai.BadRequestError, match=r"alias must be a name.*gates\.0 must have a metric"):
        post("tiny:moving/promote", gates=[{"max": 1}])
    with pytest.raises(openai.BadRequestError, match=r"alias: 'Prod' cannot be an alias.*gates\.0 must have") as caught:
        post("tiny:moving/promote", alias="Prod", gates=[{"metric": "loss", "min": 0, "max": "x"}])
    assert (caught.value.code, caught.value.param) == ("invalid_value", "alias")
    site.registry.move("latest", site.registry.publish("tiny", "ghost", {"weights": b"1"}, {}))
    for key in site.registry.storage.list("adapters/acme/tiny/ghost/"):
        site.registry.storage.delete(key)
    with pytest.raises(openai.NotFoundError, match="'tiny:ghost' does not exist"):
        site.client.models.retrieve("tiny:ghost")
    assert "tiny:ghost" not in [model.id for model in site.client.models.list()]
    delete_adapter(site.registry, "tiny", "ghost")


def test_another_tenant_sees_nothing_of_it(site: Site) -> None:
    job = site.create("mine")
    digest = site.train(job.id)
    jobs, files, models = site.other.fine_tuning.jobs, site.other.files, site.other.models
    asked: list[Any] = [
        lambda: jobs.retrieve(job.id), lambda: jobs.cancel(job.id), lambda: jobs.pause(job.id),
        lambda: jobs.resume(job.id), lambda: jobs.list_events(job.id), lambda: jobs.checkpoints.list(job.id),
        lambda: files.retrieve(f"result-{job.id}"), lambda: files.content(f"result-{job.id}"),
        lambda: models.retrieve("tiny:mine"), lambda: models.delete("tiny:mine"), lambda: jobs.list(after=job.id),
        lambda: site.other.post("/models/tiny:mine/promote", body={"alias": "prod"}, cast_to=object),
        lambda: site.other.post("/models/tiny:mine/rollback", body={}, cast_to=object),
    ]  # fmt: skip
    for ask in asked:
        with pytest.raises(openai.NotFoundError):
            ask()
    file = site.client.files.create(file=site.rows, purpose="fine-tune").id
    with pytest.raises(openai.BadRequestError, match=f"training_file: there is no file '{file}'"):
        jobs.create(model="tiny", training_file=file)
    assert list(jobs.list()) == [] and [model.id for model in models.list()] == ["tiny"]
    assert jobs.create(model="tiny", training_file=str(site.rows), suffix="mine").id != job.id
    assert site.registry.digest("tiny", "mine") == digest


def test_what_a_key_is_not_for(site: Site) -> None:
    infers, trains = site.key("acme", Scope.INFER), site.key("acme", Scope.TRAIN, running_jobs=1)
    sent: Any = {"model": "tiny", "training_file": str(site.rows)}
    for refused_call in (lambda: infers.fine_tuning.jobs.list(), lambda: infers.models.delete("tiny:triage")):
        with pytest.raises(openai.PermissionDeniedError, match="lacks the scope train"):
            refused_call()
    with pytest.raises(openai.BadRequestError, match="is for keys of the scope admin"):
        trains.fine_tuning.jobs.create(**sent)
    file = site.client.files.create(file=site.rows, purpose="fine-tune").id
    with pytest.raises(openai.PermissionDeniedError, match=r"priority above 0 .* scope admin") as hasty:
        trains.fine_tuning.jobs.create(model="tiny", training_file=file, extra_body={"priority": 1})
    assert (hasty.value.code, hasty.value.param) == ("missing_scope", "priority")
    limited = site.key("small", Scope.ADMIN, running_jobs=1)
    first = limited.fine_tuning.jobs.create(**sent, extra_body={"priority": 1})
    with pytest.raises(openai.RateLimitError, match="there may be 1 unfinished jobs") as caught:
        limited.fine_tuning.jobs.create(**sent)
    assert caught.value.response.headers["x-should-retry"] == "false"
    again = limited.fine_tuning.jobs.create(**sent, extra_body={"priority": 1})
    assert again.id == first.id, "whose answer was lost, say"
