"""What a job's rows became, in storage: encoded once, when the job is submitted, and read by every rank whenever it
comes to that.

A chat template may show today's date, and may be another one tomorrow, as transformers may: a job that is continued,
or whose ranks lie on two sides of midnight, would be another job.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cluster.storage.base import Storage, put_by_content
from cluster.storage.keys import examples_key
from jobs.spec import JobSpec
from lora_core.data.dataset import build_datasets
from lora_core.data.encoded_datasets import Datasets, read_datasets, write_datasets
from lora_core.models.base import token_rows
from lora_core.models.files import chat_template_hash


def examples_of(
    spec: JobSpec, dataset: Path, validation: Path | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Datasets:
    """Return examples to train on, and to validate on; `validation` is the file, where the spec names one."""
    fraction = spec.validation if isinstance(spec.validation, float) else None
    split_off = fraction if validation is None else validation
    return build_datasets(dataset, split_off, tokenizer, spec.train, token_rows(model))


def store_examples(storage: Storage, datasets: Datasets, tokenizer: PreTrainedTokenizerBase) -> str:
    """Put them into storage; returns the sha256 under which they are there."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "examples"
        write_datasets(datasets, path, {"tokenizer": chat_template_hash(tokenizer)})
        return put_by_content(storage, path, examples_key)


def load_examples(storage: Storage, sha256: str) -> tuple[Datasets, str]:
    """Return them, and the hash of the tokenizer and chat template that made them.

    Raises:
        StorageError: they are not there, or are not what was stored.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "examples"
        storage.fetch(examples_key(sha256), path, sha256=sha256)
        datasets, about = read_datasets(path)
    return datasets, str(about["tokenizer"])
