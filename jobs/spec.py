"""What a user asks for: one job, as YAML or JSON, checked completely before anything runs.

    base_model: smollm2-135m            # alias in the settings, hub id, local directory, GGUF file, or s3:// prefix
    dataset: jobs/examples/triage.jsonl # .jsonl, .json, .csv or .parquet, a local path or s3://
    adapter: triage                     # published as <base>:<adapter>

Everything else has a default. All mistakes are reported at once, each in one sentence that says what to change.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from cluster.requirements import expected, requirement
from jobs.duration import seconds_of
from jobs.spec_text import parse
from jobs.sweep import Sweep, tried
from lora_core.config import LoraConfig, TrainConfig
from lora_core.data.json_values import shown, unusable

MOST_DEPENDENCIES = 64
MOST_PAIRS, LONGEST_KEY, LONGEST_VALUE = 16, 64, 512
METADATA = (
    f"must be at most {MOST_PAIRS} pairs of text, keys of at most {LONGEST_KEY} characters and values of at most"
    f" {LONGEST_VALUE}, without the character NUL"
)

ADAPTER_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class SpecError(ValueError):
    """Everything that is wrong with a job spec: `problems`, one sentence each, in `source` (a path, or what it was)."""

    def __init__(self, problems: list[str], source: str = "the job spec") -> None:
        super().__init__(problems, source)
        self.problems = problems
        self.source = source

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"{self.source}: {self.problems[0]}"
        return "\n  - ".join([f"{self.source} has {len(self.problems)} problems:", *self.problems])


class JobSpec(BaseModel):
    """One fine-tuning job. `validation` is a fraction of the dataset or the path of a second one; `init_adapter` is
    where training starts: a published `<base>:<adapter>` or `<base>:<adapter>@<version>`, or the directory or s3://
    prefix of a PEFT adapter; `precision` is that of the frozen base; `num_workers` counts data-parallel ranks; among
    waiting jobs the highest `priority` goes first; it may run for `time_limit` seconds, and waits until the jobs of
    `depends_on` have succeeded. With `sweep` it is many jobs, its trials, of which the best is published."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    base_model: str = Field(min_length=1)
    dataset: str = Field(min_length=1)
    validation: float | str | None = None
    adapter: str
    init_adapter: str | None = Field(default=None, min_length=1)
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    precision: Literal["auto", "fp32", "bf16", "fp8", "nf4"] = "auto"
    num_workers: int = Field(default=1, ge=1)
    priority: int = Field(default=0, ge=-1000, le=1000)
    time_limit: float | None = Field(default=None, gt=0)
    depends_on: list[str] = Field(default_factory=list, max_length=MOST_DEPENDENCIES)
    metadata: dict[str, str] = Field(default_factory=dict)
    sweep: Sweep | None = None

    @field_validator("metadata")
    @classmethod
    def _metadata_can_be_kept(cls, pairs: dict[str, str]) -> dict[str, str]:
        if not is_metadata(pairs):
            raise ValueError(METADATA)
        return pairs

    @field_validator("time_limit", mode="before")
    @classmethod
    def _time_limit_in_seconds(cls, value: object) -> object:
        return seconds_of(value) if isinstance(value, str) else value

    @field_validator("depends_on")
    @classmethod
    def _named_once(cls, ids: list[str]) -> list[str]:
        if twice := [job_id for job_id in dict.fromkeys(ids) if ids.count(job_id) > 1]:
            raise ValueError(f"must name each job once, not {', '.join(map(_shown, twice))} twice")
        return ids

    @field_validator("adapter")
    @classmethod
    def _adapter_is_a_name(cls, name: str) -> str:
        if ADAPTER_NAME.fullmatch(name) is None:
            raise ValueError(
                "must be 1 to 64 lower-case letters, digits, '.', '_' or '-' and start with a letter or digit, "
                f"not {_shown(name)}"
            )
        return name

    @field_validator("validation")
    @classmethod
    def _validation_leaves_rows_to_train_on(cls, value: float | str | None) -> float | str | None:
        if value == "" or (isinstance(value, float) and not 0.0 < value < 0.5):
            raise ValueError(
                "must be a fraction of the rows above 0 and below 0.5, or the path of a second dataset, "
                f"not {_shown(value)}"
            )
        return value

    @field_validator("train")
    @classmethod
    def _options_of_evaluation_have_rows(cls, train: TrainConfig, info: ValidationInfo) -> TrainConfig:
        # A validation that is wrong itself is not in `data`, and has a sentence of its own.
        if train.needs_validation and info.data.get("validation", "wrong") is None:
            options = " and ".join(train.needs_validation)
            raise ValueError(
                f"has {options} but there are no validation rows to judge by: give validation, a fraction such as 0.1"
                " or the path of a second dataset"
            )
        return train

    @field_validator("sweep")
    @classmethod
    def _trials_can_be_compared(cls, sweep: Sweep | None, info: ValidationInfo) -> Sweep | None:
        if sweep is None:
            return None
        if info.data.get("validation", "wrong") is None:
            raise ValueError(
                "compares its trials by their validation loss, but there are no validation rows: give validation, a"
                " fraction such as 0.1 or the path of a second dataset"
            )
        sweep.refuse_impossible(info.data.get("lora", LoraConfig()), info.data.get("train", TrainConfig()))
        return sweep

    def trials(self) -> list[tuple[dict[str, Any], JobSpec]]:
        """Return the jobs that a sweep is, each with the values that it tries; of another job none."""
        if self.sweep is None:
            return []
        plain = self.model_copy(update={"sweep": None})
        return [
            (chosen, plain.model_copy(update={"lora": tried(self.lora, chosen), "train": tried(self.train, chosen)}))
            for chosen in self.sweep.combinations(self.train.seed)
        ]

    def canonical_json(self) -> str:
        """Return one line, the same for equal specs, which `JobSpec.model_validate_json` reads back."""
        return _canonical(self.model_dump(mode="json"))

    def content_key(
        self, dataset_sha: str, validation_sha: str | None = None, init_adapter_sha: str | None = None
    ) -> str:
        """Return the sha256 of what would be trained: datasets and the first adapter count by their content, not by
        where they lie, and `priority`, `time_limit` and `metadata` do not count, since they do not change what comes
        out. Two submissions with one key ask for the same adapter.
        """
        assert isinstance(self.validation, str) == (validation_sha is not None), "one sha256 for each dataset"
        assert (self.init_adapter is None) == (init_adapter_sha is None), "and one for the adapter to start from"
        apart = {"priority", "time_limit", "metadata", "depends_on", "sweep"}
        content = self.model_dump(mode="json", exclude=apart)
        content |= {"dataset": dataset_sha} | ({"depends_on": sorted(self.depends_on)} if self.depends_on else {})
        content |= {} if self.sweep is None else {"sweep": self.sweep.model_dump(mode="json")}
        content |= {} if validation_sha is None else {"validation": validation_sha}
        content |= {} if init_adapter_sha is None else {"init_adapter": init_adapter_sha}
        return hashlib.sha256(_canonical(content).encode()).hexdigest()


def is_metadata(value: object) -> bool:
    """Return whether a job can have it as its metadata, by which it is found: see `METADATA`."""
    return (
        isinstance(value, dict)
        and len(value) <= MOST_PAIRS
        and all(isinstance(part, str) and "\0" not in part for pair in value.items() for part in pair)
        and all(0 < len(key) <= LONGEST_KEY and len(text) <= LONGEST_VALUE for key, text in value.items())
    )


def load_spec(source: Path | str) -> JobSpec:
    """Read a spec from a file, or from its own text (a string with a line break, or that starts with a brace). Local
    paths in it become absolute, from the current directory, because the job runs elsewhere; but the base's, which may
    be an alias: see `Settings.locate_base`. Raises SpecError with every problem."""
    text, name = source, "the job spec"
    if isinstance(source, Path) or not ("\n" in source or source.lstrip().startswith("{")):
        name = str(Path(source))
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise SpecError([f"cannot read it ({reason}): give the path of a YAML or JSON job spec"], name) from None
    assert isinstance(text, str)
    try:
        values = parse(text)
    except ValueError as error:
        raise SpecError([str(error)], name) from None
    spec = check_spec(values, name)
    located = {"dataset": _absolute(spec.dataset)}
    if isinstance(spec.validation, str):
        located["validation"] = _absolute(spec.validation)
    if spec.init_adapter is not None and not is_published_adapter(spec.init_adapter):
        located["init_adapter"] = _absolute(spec.init_adapter)
    return spec.model_copy(update=located)


def check_spec(values: object, source: str = "the job spec") -> JobSpec:
    """Make a spec from parsed values (of YAML, JSON or a request). Raises SpecError with every problem."""
    if not isinstance(values, Mapping):
        raise SpecError(["it must be options, one 'key: value' a line, such as 'base_model: smollm2-135m'"], source)
    if found := [f"{location} {what}" for location, what in unusable(values)]:
        raise SpecError(found, source)
    try:
        # Strict: a quoted number or a true in the wrong place is a mistake to report, not a value to convert.
        return JobSpec.model_validate(dict(values), strict=True)
    except ValidationError as error:
        raise SpecError(list(_sentences(error)), source) from None


def is_published_adapter(source: str) -> bool:
    """Return whether it is `<base>:<adapter>`, and no path or URL."""
    return ":" in source and "://" not in source and not source.startswith(("/", ".", "~"))


def _canonical(values: dict[str, Any]) -> str:
    """Write options in alphabetic order, but a pattern's keys as they are, since the first that matches counts."""
    in_order = {
        key: dict(sorted(value.items())) if isinstance(value, dict) else value for key, value in sorted(values.items())
    }
    return json.dumps(in_order, separators=(",", ":"), allow_nan=False)


def _absolute(location: str) -> str:
    if "://" in location:
        return location
    path = Path(location)
    with contextlib.suppress(RuntimeError):  # of a user who is not known here: then there is no such file
        path = path.expanduser()
    return str(path.absolute())


def _fields_of(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """Return each field of a model with the model of its own block, where it is one, or may be."""
    kinds = {name: (field.annotation, *get_args(field.annotation)) for name, field in model.model_fields.items()}
    return {
        name: next((kind for kind in of_field if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        for name, of_field in kinds.items()
    }


def _split(loc: tuple[int | str, ...]) -> tuple[str, list[int], type[BaseModel]]:
    """Part an error's location into the dotted option, indices in it, and the model that has the option. Pydantic also
    puts the branch of a union there, which is not the user's word.
    """
    names: list[str] = [str(loc[0])]
    model: type[BaseModel] = JobSpec
    block = _fields_of(model).get(names[0])
    if block is not None and len(loc) > 1:
        names, model = [*names, str(loc[1])], block
        field = block.model_fields.get(names[1])
        if field is not None and get_origin(field.annotation) is dict and len(loc) > 2:
            names.append(str(loc[2]))  # a key of the user's
    return ".".join(names), [part for part in loc[len(names) :] if isinstance(part, int)], model


def _sentences(failed: ValidationError) -> Iterator[str]:
    """Yield one sentence an option, in plain words; the branches of a union become one sentence."""
    options: dict[str, list[ErrorDetails]] = {}
    for error in failed.errors(include_url=False):
        options.setdefault(_split(error["loc"])[0], []).append(error)
    for option, errors in options.items():
        deeper = [error for error in errors if _split(error["loc"])[1]]
        if len(errors) > 1 and not deeper:
            kinds = " or ".join(map(expected, errors))
            yield f"{option} must be {kinds}, not {_shown(errors[0]['input'])}"
            continue
        for error in deeper or errors:
            yield _sentence(error)


def _sentence(error: ErrorDetails) -> str:
    option, indices, model = _split(error["loc"])
    location = option + "".join(f"[{index}]" for index in indices)
    kind = error["type"]
    if kind == "missing":
        return f"{location} is missing: every job needs it"
    if kind in ("extra_forbidden", "invalid_key"):
        return _unknown(option, model)
    given = "" if kind in ("value_error", "string_too_short", "too_short") else f", not {_shown(error['input'])}"
    return f"{location} {requirement(error)}{given}"


def _unknown(option: str, model: type[BaseModel]) -> str:
    """Say `unknown key`, and the nearest key that there is: in the same block, or the block that has it."""
    key, option = option.rpartition(".")[2], shown(option)
    homes = {"": JobSpec} | {name: block for name, block in _fields_of(JobSpec).items() if block is not None}
    for home, owner in homes.items():
        if owner is not model and key in owner.model_fields:
            return f"unknown key '{option}': '{key}' belongs " + (f"under '{home}'" if home else "at the top level")
    near = difflib.get_close_matches(key, model.model_fields, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"the keys here are {', '.join(model.model_fields)}"
    return f"unknown key '{option}': {hint}"


def _shown(value: object) -> str:
    """Return a value as a user would name it."""
    if isinstance(value, str):
        return f"the text {value[:60]!r}"
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "empty"
    return "a list" if isinstance(value, list) else "a block of options" if isinstance(value, Mapping) else repr(value)
