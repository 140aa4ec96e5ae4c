"""`python -m jobs adapters`: from PEFT's folder to a name that moves, to a tar file and back, and away."""

from __future__ import annotations

import json
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.registry import AdapterRegistry
from cluster.settings import Settings
from cluster.storage.directory import open_storage
from cluster.storage.keys import checkpoint_marker_key, checkpoint_state_key, job_spec_key
from jobs.__main__ import main
from jobs.job import JobStatus
from jobs.job_log import JobLogWriter
from jobs.published_adapters import DAY, sweep
from jobs.store.jobs import JobQueue
from lora_core.adapters.targets import AdaptableModules
from lora_core.models.base import describe_base
from tests.support.models import random_adapter
from tests.support.queue_kit import CANCELLED, QUEUED, bring_to, spec
from tests.support.tiny_models import save_tiny_model, write_adapter

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    models = {"tiny": str(save_tiny_model("llama", tmp_path / "tiny"))}
    monkeypatch.setenv("LORA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORA_BASE_MODELS", json.dumps(models))
    return Settings(home=tmp_path / "home", base_models=models)


@pytest.fixture
def command(settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `python -m jobs adapters ...`; returns its exit code and what it said."""
    monkeypatch.setattr("jobs.__main__.log_to_stderr", lambda _: None)

    def run(*arguments: object) -> tuple[int, str]:
        code = main(["adapters", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def peft_folder(settings: Settings, folder: Path, seed: int) -> Path:
    adaptable = AdaptableModules(describe_base(settings.base_models["tiny"], settings.cache_dir)[0])
    return write_adapter(random_adapter(adaptable, seed=seed), adaptable, folder)


def test_adapters_come_in_are_promoted_and_go_out(settings: Settings, command: Command, tmp_path: Path) -> None:
    for seed in (1, 2):
        folder = peft_folder(settings, tmp_path / str(seed), seed)
        assert command("import", "tiny:a", folder) == (0, f"published tiny:a@{seed}\n")
    assert command("promote", "tiny:a@1", "prod") == (0, "tiny:a@prod is version 1 now\n")
    assert command("promote", "tiny:a", "prod")[0] == 0
    assert command("promote", "tiny:a@1", "gated", "--max", "validation_loss=0.5") == (
        2, "error: tiny:a@1 does not become tiny:a@gated: it records no validation_loss (but nothing)\n"
    )  # fmt: skip
    assert command("rollback", "tiny:a@prod") == (0, "tiny:a@prod is version 1 again\n")
    assert "tiny:a  latest 2, prod 1" in command("list")[1]
    lines = command("versions", "tiny:a")[1].splitlines()
    assert [line.split()[0] for line in lines] == ["@1", "@2"] and "prod, imported from" in lines[0]
    (entry,), (first, second) = (json.loads(command(*listing, "--json")[1])
                                 for listing in (("list",), ("versions", "tiny:a")))  # fmt: skip
    assert (entry["model"], entry["number"], entry["aliases"]["prod"]["number"]) == ("tiny:a", 2, 1)
    assert [one["model"] for one in (first, second)] == ["tiny:a@1", "tiny:a@2"] and entry["digest"] == second["digest"]
    assert (first["aliases"], second["aliases"], first["imported_from"]) == (["prod"], ["latest"], str(tmp_path / "1"))
    assert "is not deleted while it is prod" in command("delete", "tiny:a@1")[1]

    assert command("export", "tiny:a@prod", tmp_path / "a.tar")[0] == 0
    with tarfile.open(tmp_path / "a.tar") as archive:
        archive.extractall(tmp_path / "out", filter="data")
    assert command("import", "tiny:b", tmp_path / "out" / "a") == (0, "published tiny:b@1\n")
    registry = AdapterRegistry(open_storage(settings.storage_url))
    original, copy = registry.resolve("tiny", "a", "1"), registry.resolve("tiny", "b")
    assert copy.digest == original.digest and copy.manifest["base_fingerprint"]
    assert command("export", "tiny:a@1", tmp_path / "a.gguf", "--gguf")[0] == 0
    assert (tmp_path / "a.gguf").read_bytes().startswith(b"GGUF")
    assert command("export", "tiny:a@1", tmp_path / "merged", "--merged", "fp32")[0] == 0
    name = "model.layers.0.mlp.up_proj"
    merged, base = (load_file(tmp_path / folder / "model.safetensors") for folder in ("merged", "tiny"))
    adapter = load_file(tmp_path / "1" / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    torch.testing.assert_close(
        merged[f"{name}.weight"].double() - base[f"{name}.weight"].double(), b @ a, atol=1e-5, rtol=1e-4
    )

    (tmp_path / "out" / "a" / "adapter_config.json").write_text("{}")
    assert "its files are not those of its manifest.json" in command("import", "tiny:b", tmp_path / "out" / "a")[1]
    (tmp_path / "out" / "a" / "manifest.json").unlink()
    assert "adapter_config.json does not fit" in command("import", "tiny:b", tmp_path / "out" / "a")[1]
    assert command("delete", "tiny:a@prod") == (0, "deleted tiny:a@prod\n")
    assert command("delete", "tiny:a@1") == (0, "deleted tiny:a@1\n")
    assert command("delete", "tiny:b") == (0, "deleted tiny:b\n")
    assert registry.versions("tiny", "b") == []


def test_an_adapter_of_other_weights_does_not_come_in(settings: Settings, command: Command, tmp_path: Path) -> None:
    command("import", "tiny:a", peft_folder(settings, tmp_path / "1", 1))
    command("export", "tiny:a", tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as archive:
        archive.extractall(tmp_path / "out", filter="data")
    save_tiny_model("llama", tmp_path / "tiny", seed=9)
    code, said = command("import", "tiny:a", tmp_path / "out" / "a")
    assert code == 2 and "it was trained on other weights" in said
    for form in (("--merged", "fp32"), ("--gguf",)):
        assert "it was trained on other weights" in command("export", "tiny:a", tmp_path / "m", *form)[1]
    weights = tmp_path / "1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
    assert "has numbers that are not finite" in command("import", "tiny:a", tmp_path / "1")[1]
    assert "write <base>:<adapter> as in a job" in command("import", "tiny:A@1", tmp_path / "1")[1]


def test_what_a_job_needs_stays(settings: Settings, command: Command) -> None:
    registry, queue = AdapterRegistry(open_storage(settings.storage_url)), JobQueue(settings.database_url)
    first, _ = (registry.publish("base", "a", {"weights": bytes([number])}, {}) for number in (1, 2))
    needs = {"cluster": "c", "base": "base", "dataset_sha": "d", "code_version": "v"}
    start, _ = queue.submit(spec("b", init_adapter="base:a@1"), **needs, init_adapter_sha=first.digest)
    assert f"@1 is not deleted while {start.id} starts from it; cancel" in command("delete", "base:a@1")[1]
    assert f"is not deleted while {start.id} starts from it" in command("delete", "base:a")[1]
    assert queue.move(start.id, QUEUED, CANCELLED, message="gone")
    trains, _ = queue.submit(spec("a"), **needs)
    assert f"base:a is not deleted while {trains.id} trains it" in command("delete", "base:a")[1]
    assert command("delete", "base:a@1")[0] == 0
    queue.close()


def test_what_nobody_needs_goes(settings: Settings) -> None:
    storage, queue = open_storage(settings.storage_url), JobQueue(settings.database_url, lambda: 1000.0)
    ended, paused = bring_to(queue, JobStatus.FAILED), bring_to(queue, JobStatus.PAUSED, "b")
    for job_id in (ended.id, paused.id, "job-of-another-database"):
        storage.put(checkpoint_state_key(job_id, 1, 5), b"state")
        storage.put(checkpoint_marker_key(job_id, 1, 5), b"{}")
    registry = AdapterRegistry(storage, "another")
    for content in (b"1", b"2"):
        registry.publish("tiny", "a", {"weights": content}, {})
    sweep(settings.model_copy(update={"version_ttl_days": float("inf")}), queue, storage)
    assert len(registry.versions("tiny", "a")) == 2
    sweep(settings.model_copy(update={"version_ttl_days": 1e-9}), queue, storage)
    assert [version.number for version in registry.list_versions("tiny", "a")] == [2]
    jobs = {key.split("/")[1] for key in storage.list("jobs/")}
    assert jobs == {paused.id, "job-of-another-database"}
    queue.close()


def test_jobs_are_forgotten_and_what_they_published_stays(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    now, storage = [time.time() - 3 * DAY], open_storage(settings.storage_url)
    queue, registry = JobQueue(settings.database_url, lambda: now[0]), AdapterRegistry(storage)
    old = [bring_to(queue, JobStatus.SUCCEEDED, f"old{number}") for number in range(3)]
    now[0] += 2 * DAY
    kept = [bring_to(queue, status, status) for status in (JobStatus.FAILED, JobStatus.PAUSED)]
    registry.publish("tiny", "a", {"weights": b"1"}, {"job": old[0].id})
    for job in (*old, *kept):
        storage.put(job_spec_key(job.id), b"{}")
        JobLogWriter(storage, job.id, 0).write(queue.events(job.id))
    for days in (float("inf"), 3.5):
        sweep(settings.model_copy(update={"job_ttl_days": days}), queue, storage)
        assert len(queue.list()) == 5
    monkeypatch.setattr("jobs.published_adapters.FORGOTTEN_AT_ONCE", 1)
    monkeypatch.setattr("jobs.published_adapters.MOST_FORGOTTEN", 2)
    for left in (3, 2):
        sweep(settings.model_copy(update={"job_ttl_days": 2.0}), queue, storage)
        assert len(queue.list()) == left, "so many at a time"
    assert {job.id for job in queue.list()} == {job.id for job in kept}
    assert {key.split("/")[1] for key in storage.list("jobs/")} == {job.id for job in kept}
    assert registry.resolve("tiny", "a").manifest["job"] == old[0].id
    queue.close()
