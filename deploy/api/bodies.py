"""What bodies look like that routes read by themselves, and every error, for the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from jobs.duration import DURATION
from jobs.spec import MOST_DEPENDENCIES
from jobs.sweep import Sweep
from lora_core.config import LoraConfig, TrainConfig

_Auto = Literal["auto"]
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"


class ErrorDetail(BaseModel):
    """`message` says everything that is wrong, `param` names the first of it."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class ErrorBody(BaseModel):
    error: ErrorDetail


class Hyperparameters(BaseModel):
    """`auto` is 3, 8 and 1; the multiplier is of 2.0e-4."""

    model_config = ConfigDict(extra="forbid")

    n_epochs: _Auto | Annotated[int, Field(ge=1)] = "auto"
    batch_size: _Auto | Annotated[int, Field(ge=1)] = "auto"
    learning_rate_multiplier: _Auto | Annotated[float, Field(gt=0)] = "auto"


class DpoHyperparameters(Hyperparameters):
    """`auto` is 3, 8, 1 and 0.1; the multiplier is of 2.0e-5."""

    beta: _Auto | Annotated[float, Field(gt=0)] = "auto"


class Supervised(BaseModel):
    hyperparameters: Hyperparameters | None = None


class Dpo(BaseModel):
    hyperparameters: DpoHyperparameters | None = None


class Method(BaseModel):
    """With the hyperparameters of the type that it has."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["supervised", "dpo"] = "supervised"
    supervised: Supervised | None = None
    dpo: Dpo | None = None


class JobBody(BaseModel):
    """OpenAI's parameters and, from `dry_run` on, this service's, which OpenAI's client sends as `extra_body`."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="a base, or a published adapter to go on from")
    training_file: str = Field(description="the id of a file; for the scope admin also a path or s3:// URL")
    validation_file: str | None = None
    suffix: str | None = Field(
        default=None, description="the adapter's name", pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$"
    )  # fmt: skip
    method: Method | None = None
    hyperparameters: Hyperparameters | DpoHyperparameters | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    metadata: dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]] | None = (
        Field(default=None, max_length=16)
    )
    integrations: list[dict[str, Any]] | None = Field(default=None, max_length=0)
    dry_run: bool | None = Field(default=None, description="make no job, and say what it comes to")
    validation: float | None = Field(default=None, gt=0, lt=0.5, description="the fraction of rows to validate on")
    init_adapter: str | None = Field(default=None, description="a published adapter to go on from")
    lora: LoraConfig | None = None
    train: TrainConfig | None = None
    precision: Literal["auto", "fp32", "bf16", "fp8", "nf4"] | None = None
    num_workers: int | None = Field(default=None, ge=1)
    priority: int | None = Field(default=None, ge=-1000, le=1000)
    time_limit: Annotated[float, Field(gt=0)] | Annotated[str, Field(pattern=DURATION)] | None = Field(
        default=None, description="seconds, or as 90m or 2h, that it may run, over all attempts"
    )
    depends_on: list[str] | None = Field(
        default=None, max_length=MOST_DEPENDENCIES, description="jobs that must have succeeded before it starts"
    )  # fmt: skip
    sweep: Sweep | None = Field(default=None, description="values to try, of options of lora and train")


class GateBody(BaseModel):
    """What a metric of the version has to be; one of the two bounds at least."""

    model_config = ConfigDict(extra="forbid")

    metric: str
    min: float | None = None
    max: float | None = None


class Promotion(BaseModel):
    """The alias that is to mean this version, and what a version must pass for that, from now on."""

    model_config = ConfigDict(extra="forbid")

    alias: str = Field(pattern=r"^[a-z][a-z0-9._-]{0,63}$")
    gates: list[GateBody] | None = None


class FileBody(BaseModel):
    """`expires_after` is 1 hour to 30 days from then."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"dependentRequired": {_ANCHOR: [_SECONDS], _SECONDS: [_ANCHOR]}}
    )

    file: Annotated[bytes, Field(description=".jsonl, .json, .csv or .parquet", json_schema_extra={"format": "binary"})]
    purpose: Literal["fine-tune"]
    expires_after_anchor: Literal["created_at"] = Field(default="created_at", alias=_ANCHOR)
    expires_after_seconds: int = Field(default=3600, alias=_SECONDS, ge=3600, le=2_592_000)


class PartBody(BaseModel):
    data: Annotated[bytes, Field(json_schema_extra={"format": "binary"})]


def body_of(kind: type[BaseModel], media_type: str = "application/json") -> dict[str, Any]:
    """Return what a route's `openapi_extra` says of a body that the route reads by itself."""
    schema = kind.model_json_schema()
    found = _inlined(schema, schema.pop("$defs", {}))
    return {"requestBody": {"required": True, "content": {media_type: {"schema": found}}}}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """Return a schema with what it refers to in its place."""
    if isinstance(schema, list):
        return [_inlined(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        rest = {name: part for name, part in schema.items() if name != "$ref"}
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]] | rest, definitions)
    return {name: _inlined(part, definitions) for name, part in schema.items()}
