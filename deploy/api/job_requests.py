"""What clients send to make a fine-tuning job: OpenAI's fields, and beside them a job's own options.

    client.fine_tuning.jobs.create(model="tiny", training_file="file-...", suffix="triage",
                                   extra_body={"lora": {"r": 32}, "num_workers": 2})

becomes a `JobSpec`; everything that is wrong comes at once, under the name that the client gave it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, get_args

from deploy.api.schemas import Problem, refused
from jobs.spec import METADATA, JobSpec, SpecError, check_spec, is_metadata, is_published_adapter
from lora_core.config import Method, TrainConfig
from lora_core.data.json_values import shown

WINDOW_SECONDS = 600.0
"""In which the same request without an Idempotency-Key is the same job: longer than clients go on trying."""

LEARNING_RATES: Mapping[str, float] = {method: TrainConfig(method=method).learning_rate for method in get_args(Method)}
"""What `learning_rate_multiplier` multiplies: about ten times what suits training all weights (LoRA Without Regret)."""

OWN = ("lora", "train", "precision", "num_workers", "priority", "time_limit", "depends_on", "sweep")
"""Options that have no other name here."""

_OPENAI = (
    "model", "training_file", "validation_file", "method", "hyperparameters", "suffix", "seed", "metadata",
    "integrations", "dry_run", "validation", "init_adapter",
)  # fmt: skip
_NAMES = {
    "base_model": "model",
    "dataset": "training_file",
    "validation": "validation_file",
    "adapter": "suffix",
    "train.seed": "seed",
    "train.method": "method.type",
    "train.epochs": "hyperparameters.n_epochs",
    "train.batch_size": "hyperparameters.batch_size",
    "train.learning_rate": "hyperparameters.learning_rate_multiplier",
}
"""What a client calls an option."""

_EXPRESSIONS = ("target_modules", "rank_pattern", "alpha_pattern")
_MOST_EXPRESSIONS, _LONGEST_EXPRESSION = 128, 256  # of a pattern; Python keeps 512 compiled
_PLAIN = r"(?:[A-Za-z0-9_.|-]|\\\.|\\d\+?)*+"  # without what is tried again in many ways: groups and repeats
_QUICK = re.compile(rf"{_PLAIN}(?:\*{_PLAIN})?")


@dataclass(frozen=True)
class JobRequest:
    """A job that is asked for: `document` is kept to answer with, and the `digest` of equal requests is equal.
    `named` is what the client calls options.
    """

    spec: JobSpec
    document: dict[str, Any]
    metadata: dict[str, str] | None
    digest: str
    dry_run: bool
    named: Mapping[str, str]

    def problems(self, sentences: Sequence[str]) -> list[Problem]:
        """Put what checking the job has found into the client's words: the ids of files stand for where they lie."""
        for parameter, place in (("training_file", self.spec.dataset), ("validation_file", self.spec.validation)):
            if isinstance(place, str) and (file := self.document[parameter]) != place:
                somewhere = re.compile(rf"{re.escape(place)}|\S*{re.escape(PurePath(place).name)}")  # or a copy of it
                sentences = [somewhere.sub(str(file), sentence) for sentence in sentences]
        return [_problem(sentence, self.named) for sentence in sentences]


def parse_job_request(
    document: Mapping[str, Any], bases: Mapping[str, str], locate: Callable[[str, object], str]
) -> JobRequest:
    """Check what `read_document` read. `bases` are the models that can be trained; `locate` returns where the rows of a
    parameter lie, or raises ValueError with a sentence.

    Raises:
        ApiError: 400, with everything that is wrong; its `param` is the first of it.
    """
    given = {name: value for name, value in document.items() if value is not None}
    problems = [*_unknown(given), *_metadata_problems(given.get("metadata"))]
    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()
    values: dict[str, Any] = {option: given[option] for option in OWN if option in given}
    if isinstance(lora := given.get("lora"), dict):
        values["lora"] = _with_quick_expressions(lora, problems)
    train = _block(values.get("train"), "train", problems)
    kind = _kind(given, train)
    named = _NAMES | ({"train.beta": "hyperparameters.beta"} if kind == "dpo" else {})
    if ":" in str(given.get("model")):
        named["init_adapter"] = "model"
    if "hyperparameters" not in given:
        named |= {o: n.replace("hyper", f"method.{kind}.hyper") for o, n in named.items() if n.startswith("hyper")}
    for option, value in _of_openai(given, kind, problems).items():
        own = option.removeprefix("train.")
        if own != option and own in train:
            problems.append((named[option], "invalid_value", f"{named[option]} and {option} are both given; give one"))
        elif own != option:
            train[own] = value
    values["train"] = train
    values |= _model(given, bases, problems)
    values["adapter"] = given.get("suffix", f"ft-{digest[:8]}")
    values |= _located(given, locate, problems)
    spec: JobSpec | None = None
    try:
        spec = check_spec(values, "the job")
    except SpecError as error:
        problems += [_problem(sentence, named) for sentence in error.problems]
    if problems or spec is None:
        raise refused(problems)
    kept = {name: given.get(name) for name in ("training_file", "validation_file")}
    return JobRequest(spec, kept | {"digest": digest}, given.get("metadata"), digest, bool(given.get("dry_run")), named)


def _with_quick_expressions(lora: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """Return the options without expressions that could take for ever: they are run when a job is checked, in processes
    that everybody waits for.
    """
    slow = {name: found for name in _EXPRESSIONS if (found := _slow_expressions(lora.get(name)))}
    for name, found in slow.items():
        sentence = (
            f"lora.{name} has '{shown(found[0])}': write names, '.', '|' and '\\d' or '\\d+', with '.*' once at most,"
            f" {_LONGEST_EXPRESSION} characters at most, and at most {_MOST_EXPRESSIONS} of them"
        )
        problems.append((f"lora.{name}", "invalid_value", sentence))
    return {name: value for name, value in lora.items() if name not in slow}


def _slow_expressions(value: object) -> list[str]:
    """Return those in a string, or the keys of a pattern, that are not plain; all of them where they are too many."""
    found = [value] if isinstance(value, str) else list(value) if isinstance(value, dict) else []
    if len(found) > _MOST_EXPRESSIONS:
        return found
    return [one for one in found if len(one) > _LONGEST_EXPRESSION or _QUICK.fullmatch(one) is None]


def _located(given: Mapping[str, Any], locate: Callable[[str, object], str], problems: list[Problem]) -> dict[str, Any]:
    """Return where rows lie, and an adapter to start from that is not named as a model."""
    found: dict[str, Any] = {}
    for parameter, option in (
        ("training_file", "dataset"), ("validation_file", "validation"), ("init_adapter", "init_adapter")
    ):  # fmt: skip
        if parameter not in given:
            continue
        value = given[parameter]
        if option == "init_adapter" and isinstance(value, str) and is_published_adapter(value):
            found[option] = value
            continue
        try:
            found[option] = locate(parameter, value)
        except ValueError as error:
            problems.append((parameter, "invalid_value", f"{parameter}: {error}"))
            found[option] = "unknown"
    if (fraction := given.get("validation")) is not None:
        if isinstance(fraction, float) and "validation_file" not in given:
            found["validation"] = fraction
        else:
            sentence = "validation must be a fraction of the rows, or give validation_file instead"
            problems.append(("validation", "invalid_value", sentence))
    return found


def _unknown(given: Mapping[str, Any]) -> list[Problem]:
    """Name what is no parameter, and what is one that would need what there is not."""
    problems: list[Problem] = []
    known = [*_OPENAI, *OWN]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            problems.append((shown(name), "unknown_parameter", f"{shown(name)} is no parameter here; {hint}"))
    if given.get("integrations"):
        problems.append(("integrations", "unsupported_parameter", "integrations is not supported here; leave it out"))
    if not isinstance(given.get("dry_run", False), bool):
        problems.append(("dry_run", "invalid_value", "dry_run must be true or false"))
    return problems


def _metadata_problems(metadata: object) -> list[Problem]:
    return [] if metadata is None or is_metadata(metadata) else [("metadata", "invalid_value", f"metadata {METADATA}")]


def _block(value: object, name: str, problems: list[Problem]) -> dict[str, Any]:
    if value is None or isinstance(value, dict):
        return dict(value or {})
    problems.append((name, "invalid_value", f"{name} must be a block of options"))
    return {}


def _kind(given: Mapping[str, Any], train: Mapping[str, Any]) -> str:
    """Return the method that is asked for, supervised where it is none that there is."""
    method = given.get("method")
    kind = method.get("type", "supervised") if isinstance(method, dict) else train.get("method")
    return str(kind) if kind in get_args(Method) else "supervised"


def _of_openai(given: Mapping[str, Any], kind: str, problems: list[Problem]) -> dict[str, Any]:
    """Return options of training by what OpenAI calls them; `auto` is what they are where nobody says anything."""
    method = {
        name: value for name, value in _block(given.get("method"), "method", problems).items() if value is not None
    }
    options: dict[str, Any] = {"train.seed": given["seed"]} if "seed" in given else {}
    if method.get("type", kind) != kind:
        sentence = f"method.type must be {' or '.join(get_args(Method))}, not {shown(str(method['type']))}"
        problems.append(("method.type", "unsupported_parameter", f"{sentence}; other methods are not supported here"))
    elif "type" in method:
        options["train.method"] = kind
    for name in method.keys() - {"type", kind}:
        sentence = f"method.{shown(name)} does not go with the type {kind}; leave it out, or set method.type"
        problems.append((f"method.{shown(name)}", "unknown_parameter", sentence))
    of_kind = _block(method.get(kind), f"method.{kind}", problems)
    inner = _block(of_kind.get("hyperparameters"), f"method.{kind}.hyperparameters", problems)
    outer = _block(given.get("hyperparameters"), "hyperparameters", problems)
    if inner and outer and inner != outer:
        sentence = f"hyperparameters and method.{kind}.hyperparameters differ; give one of them"
        problems.append(("hyperparameters", "invalid_value", sentence))
    hyperparameters = outer or inner
    known = {
        "n_epochs": "train.epochs",
        "batch_size": "train.batch_size",
        "learning_rate_multiplier": "train.learning_rate",
    } | ({"beta": "train.beta"} if kind == "dpo" else {})
    for name, value in hyperparameters.items():
        if name not in known:
            sentence = f"hyperparameters.{shown(name)} is no parameter here; there are: {', '.join(known)}"
            problems.append((f"hyperparameters.{shown(name)}", "unknown_parameter", sentence))
        elif value not in ("auto", None):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            options[known[name]] = value * LEARNING_RATES[kind] if name.startswith("learning") and number else value
    return options


def _model(given: Mapping[str, Any], bases: Mapping[str, str], problems: list[Problem]) -> dict[str, Any]:
    """Return the base, and where a published adapter is to be trained on, that."""
    model = given.get("model")
    if not isinstance(model, str):
        problems.append(
            ("model", "missing_parameter", "model must be the name of a base, or of an adapter to go on from")
        )
        return {"base_model": "unknown"}
    base, colon, _ = model.partition(":")
    if base not in bases:
        sentence = f"the model {shown(model)!r} cannot be trained; there are: {', '.join(bases)}, and adapters of them"
        problems.append(("model", "model_not_found", sentence))
    return {"base_model": base, **({"init_adapter": model} if colon else {})}


def _problem(sentence: str, named: Mapping[str, str]) -> Problem:
    """Put a sentence about an option under the client's name for it."""
    option, _, rest = sentence.partition(" ")
    colon = ":" if option.endswith(":") else ""
    name = named.get(option.rstrip(":"), option.rstrip(":"))
    code = "missing_parameter" if rest.startswith("is missing") else "invalid_value"
    return name, code, f"{name}{colon} {rest}"
