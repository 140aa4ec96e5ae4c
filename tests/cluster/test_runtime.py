"""Which Ray a process belongs to. On a real one: tests/end_to_end/test_service.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.embedded_ray import EmbeddedRay, embedded_environment
from cluster.ray_runtime import cluster_name, job_runtime_env, on_a_cluster, use_own_ray
from cluster.settings import Settings
from jobs import demo
from tests.support.another_ray import raylet_command

OTHER = {"RAY_ADDRESS": "10.0.0.9:6379", "RAY_API_SERVER_ADDRESS": "http://10.0.0.9:8265", "RAY_AUTH_TOKEN": "theirs"}


def test_inside_a_ray_job_the_ray_that_runs_it_counts(tmp_path: Path) -> None:
    """Two processes below a raylet, as a job's are, in an environment that names another Ray."""
    say = "from cluster.ray_runtime import *; use_own_ray(); print(json.dumps({n: os.environ[n] for n in WHICH_RAY}))"
    job = [sys.executable, "-c", say]
    between = f"import subprocess; subprocess.run({job!r}, check=True)"
    below = f"import subprocess; subprocess.run({[sys.executable, '-c', between]!r}, check=True)"
    raylet = raylet_command(tmp_path, below, "10.0.0.1:7000")
    output = subprocess.run(raylet, env={**os.environ, **OTHER}, capture_output=True, text=True, check=True).stdout
    assert json.loads(output) == {"RAY_ADDRESS": "10.0.0.1:7000", "RAY_API_SERVER_ADDRESS": ""}


def test_elsewhere_the_environment_says_which_ray_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    for name in OTHER:
        monkeypatch.delenv(name, raising=False)
    for nothing in ({}, {"RAY_ADDRESS": ""}, {"RAY_ADDRESS": "local"}):
        for name, value in nothing.items():
            monkeypatch.setenv(name, value)
        use_own_ray()
        assert not on_a_cluster()
        assert cluster_name(settings) == "local"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://10.0.0.9:8265")
    assert on_a_cluster()
    assert cluster_name(settings) == "http://10.0.0.9:8265"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    assert cluster_name(settings) == "10.0.0.9:6379"


def test_an_embedded_ray_takes_nothing_from_another_rays_variables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REPORTER_UPDATE_INTERVAL_MS", "100")
    prepared = {**OTHER, **embedded_environment(Settings(home=tmp_path / "new"))}
    assert not any(prepared[name] for name in OTHER)
    quiet = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "REPORTER_UPDATE_INTERVAL_MS"
    assert [prepared[name] for name in quiet] == ["0", "100"]  # what somebody has chosen stays
    embedded = EmbeddedRay(1, 0.0, "10.0.0.1:7000", "http://127.0.0.1:9000", prepared["RAY_AUTH_TOKEN_PATH"])
    connected = {**OTHER, **embedded.environment}
    assert [connected[name] for name in OTHER] == ["10.0.0.1:7000", "http://127.0.0.1:9000", ""]


def test_what_a_job_passes_on_does_not_say_which_ray_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime_env = {"working_dir": "gcs://code.zip", "env_vars": {"A": "1", **OTHER}, "config": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": runtime_env}))
    expected = {"working_dir": "gcs://code.zip", "env_vars": {"A": "1", "RAY_AUTH_TOKEN": "theirs"}}
    assert job_runtime_env() == expected


def test_the_demo_keeps_to_its_own_ray(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It would submit to the cluster of this shell, and then wait for one on this machine."""
    monkeypatch.setenv("LORA_HOME", str(tmp_path))
    for name, value in OTHER.items():
        monkeypatch.setenv(name, value)
    refused = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr("jobs.demo.subprocess.run", lambda *_, **__: refused)
    assert demo.main() == 3
    assert not on_a_cluster()
    assert "RAY_ADDRESS=10.0.0.9:6379 is left out of account" in capsys.readouterr().out
