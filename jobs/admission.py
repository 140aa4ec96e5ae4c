"""Check a job completely before any worker starts, and put its rows where the workers find them.

Everything that can be known without a GPU is: base model, target modules, rows, labels, storage, size of the
cluster. All mistakes come together, each in one sentence.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cluster.settings import ALIAS, Settings
from cluster.sources import fetch_url, listed_files, local_source
from cluster.storage.base import Storage, StorageError, put_by_content
from cluster.storage.directory import open_storage
from cluster.storage.keys import dataset_key
from jobs.admitted import Admitted, Rows
from jobs.initial_adapter import fetch_initial, store_initial
from jobs.spec import JobSpec, SpecError
from jobs.stored_examples import examples_of, store_examples
from jobs.trials import NewTrial
from lora_core.adapters.adapter import Adapter
from lora_core.adapters.init import LoraConfigError, continued_adapter
from lora_core.adapters.peft_format import read_adapter
from lora_core.adapters.targets import AdaptableModules
from lora_core.config import LoraConfig
from lora_core.data.dataset import DatasetError, DatasetReport
from lora_core.models.base import describe_base, not_quantised, too_long
from lora_core.models.checks import BaseModelError
from lora_core.models.forward import ForwardPath, forward_path
from lora_core.models.precision import QUANTISED

T = TypeVar("T")


def admit(spec: JobSpec, settings: Settings, max_workers: int | None, known: Sequence[str] = ()) -> Admitted:
    """Check a spec and store its rows. `max_workers` is what the cluster can ever have (None: not known); `known` is
    what is known to be wrong already.

    Raises:
        SpecError: everything that is wrong.
    """
    problems = list(known)
    if max_workers is not None and spec.num_workers > max_workers:
        problems.append(
            f"num_workers is {spec.num_workers}, but this cluster has room for {max_workers}; lower it"
            " (or raise LORA_MAX_WORKERS if it can grow)"
        )
    if (quota := settings.quota(settings.tenant).workers) is not None and spec.num_workers > quota:
        problems.append(
            f"num_workers is {spec.num_workers}, but {settings.tenant} may have {quota} workers; lower it"
            " (or raise LORA_QUOTAS)"
        )
    if ALIAS.fullmatch(name := settings.base_name(spec.base_model)) is None:
        alias = json.dumps({"my-base": spec.base_model})
        problems.append(
            f"base_model: nobody could ask for {name}:{spec.adapter}, as a base's name has letters, digits, '.', '_'"
            f" and '-' only; rename it, or give it an alias: LORA_BASE_MODELS='{alias}'"
        )
    storage = _checked(lambda: _writable(settings), problems, "storage")
    described = _checked(lambda: _described(spec, settings), problems, "base_model")
    trials = spec.trials()
    loras, paths = [trial.lora for _, trial in trials] or [spec.lora], list[ForwardPath]()
    if described is not None:
        adaptable = AdaptableModules(described[0])
        paths = _paths(described[0].config, adaptable, loras, spec.precision, problems)
        if spec.precision in QUANTISED and (problem := not_quantised(described[0], spec.precision)):
            problems.append(f"precision: {problem}")
    with (
        _local(spec.dataset, problems, "dataset") as dataset,
        _local(spec.validation, problems, "validation") as validation,
        tempfile.TemporaryDirectory() as folder,
    ):
        adapter = Path(folder) / "adapter"  # not its own name, which may be none of a folder
        if spec.init_adapter is not None and described is not None and storage is not None:
            _check_initial(spec, loras, settings, storage, adaptable, adapter, problems)
        examples, summary = None, list[str]()
        if described is not None and dataset is not None:
            examples = _checked(lambda: examples_of(spec, dataset, validation, *described), problems, "dataset")
            if examples is not None:
                summary = examples[0].report.lines()
                lengths = [len(example.ids) for part in examples if part is not None for example in part.examples]
                if problem := too_long(described[0], max(lengths)):
                    problems.append(f"train.max_seq_len: {problem}")
        if problems or not (storage and described and dataset and examples and paths):
            raise SpecError(problems)
        dataset_sha = put_by_content(storage, dataset, dataset_key)
        validation_sha = None if validation is None else put_by_content(storage, validation, dataset_key)
        examples_sha = store_examples(storage, examples, described[1])
        init_adapter_sha = None if spec.init_adapter is None else store_initial(storage, adapter)
        report = examples[0].report
        counted = report.examples, report.tokens, report.supervised_tokens, max(lengths)
        rows = Rows(*counted, *_steps(spec, report))
        tried = [_new_trial(*trial, path, report) for trial, path in zip(trials, paths, strict=False)]
    shas = dataset_sha, validation_sha, examples_sha, init_adapter_sha
    return Admitted(storage, *shas, paths[0], rows, summary, tuple(tried))


def _new_trial(chosen: dict[str, Any], spec: JobSpec, path: ForwardPath, report: DatasetReport) -> NewTrial:
    steps, step_tokens = _steps(spec, report)
    return NewTrial(parameters=chosen, spec=spec, forward_path=path, steps=steps, step_tokens=step_tokens)


def _steps(spec: JobSpec, report: DatasetReport) -> tuple[int, int]:
    """Return how many optimizer steps a job has, and the tokens of one on average."""
    of_epoch = -(-report.examples // spec.train.batch_size)
    return spec.train.epochs * of_epoch, math.ceil(report.tokens / of_epoch)


def _paths(
    config: PretrainedConfig,
    adaptable: AdaptableModules,
    loras: Sequence[LoraConfig],
    precision: str,
    problems: list[str],
) -> list[ForwardPath]:
    """Return the path through the base of each adapter, or add what is wrong with them, each once."""
    wrong: list[str] = []
    found = {
        text: _fits(partial(forward_path, config, adaptable, lora, precision), wrong)
        for text, lora in _unlike(loras).items()
    }
    problems += dict.fromkeys(wrong)
    return [path for lora in loras if (path := found[lora.model_dump_json()]) is not None]


def _check_initial(
    spec: JobSpec,
    loras: Sequence[LoraConfig],
    settings: Settings,
    storage: Storage,
    adaptable: AdaptableModules,
    folder: Path,
    problems: list[str],
) -> None:
    """Fetch the adapter to start from into `folder`, and see that adapters of these options can go on from it."""
    source, base = str(spec.init_adapter), settings.base_name(spec.base_model)

    def fetch() -> Adapter:
        folder.mkdir()
        fetch_initial(source, base, storage, settings, folder)
        return read_adapter(folder, adaptable)

    given = _checked(fetch, problems, "init_adapter")
    if given is not None and not any(problem.startswith("lora.") for problem in problems):
        wrong: list[str] = []
        for lora in _unlike(loras).values():
            _fits(partial(continued_adapter, adaptable, lora, given), wrong)
        problems += dict.fromkeys(wrong)


def _unlike(loras: Sequence[LoraConfig]) -> dict[str, LoraConfig]:
    """Return each of them once, by what is in it."""
    return {lora.model_dump_json(): lora for lora in loras}


def _fits(check: Callable[[], T], problems: list[str]) -> T | None:
    try:
        return check()
    except LoraConfigError as error:
        problems += [p if p.startswith("init_adapter") else f"lora.{p}" for p in error.problems]
    return None


def _described(spec: JobSpec, settings: Settings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source = settings.resolve_base(spec.base_model)
    folder = local_source(source, settings.cache_dir, weights=False)
    return describe_base(folder, settings.cache_dir, listed_files(source))


def _writable(settings: Settings) -> Storage:
    storage = open_storage(settings.storage_url)
    storage.check()
    return storage


def _checked(check: Callable[[], T], problems: list[str], option: str) -> T | None:
    """Return the result, or None and add a problem."""
    try:
        return check()
    except (BaseModelError, DatasetError, StorageError, ValueError) as error:
        problems.append(f"{option}: {error}")
    return None


@contextmanager
def _local(location: str | float | None, problems: list[str], option: str) -> Iterator[Path | None]:
    """Yield a dataset as a local file: itself, or a copy of an s3:// object while the block runs."""
    if not isinstance(location, str):
        yield None
        return
    if "://" not in location:
        path = Path(location)
        if not path.is_file():
            problems.append(f"{option}: {location} is not a file that can be read here; give a path, or an s3:// URL")
        yield path if path.is_file() else None
        return
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / Path(location).name
        found = _checked(lambda: fetch_url(location, target), problems, option)
        yield found
