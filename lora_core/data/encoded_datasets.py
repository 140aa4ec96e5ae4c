"""Encoded data sets in a file of their own: what rows became when training was asked for, whatever the date in a chat
template, the template itself or a library say later.

    train.ids    int32 [tokens]      of all examples, one behind the other
    train.mask   bool  [tokens]      which of them are labels
    train.ends   int64 [examples]    where each example ends
    held_out.*                       the same of the validation rows, where there are some

It is a safetensors file. The same data sets are the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_core.data.dataset import Dataset, DatasetReport, Example
from lora_core.data.format import RowNumber

Datasets = tuple[Dataset, Dataset | None]
"""Examples to train on, and those to validate on."""

PARTS = ("train", "held_out")  # the second: to validate on


def write_datasets(datasets: Datasets, path: Path, about: Any = None) -> None:
    """Write both to `path`, and what the writer wants to know of them later (JSON's values)."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    reports = {}
    for part, dataset in zip(PARTS, datasets, strict=True):
        if dataset is not None:
            examples = dataset.examples
            tensors[f"{part}.ids"] = np.fromiter(chain.from_iterable(e.ids for e in examples), np.int32)
            tensors[f"{part}.mask"] = np.fromiter(chain.from_iterable(e.labels_mask for e in examples), np.bool_)
            tensors[f"{part}.ends"] = np.cumsum([len(example.ids) for example in examples], dtype=np.int64)
            reports[part] = _report_values(dataset.report)
    # One entry: safetensors puts several in another order each time.
    save_file(tensors, path, {"encoded": json.dumps({"reports": reports, "about": about})})


def read_datasets(path: Path) -> tuple[Datasets, Any]:
    """Read what `write_datasets` wrote.

    Raises:
        ValueError: it is no such file.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            encoded = json.loads(file.metadata()["encoded"])
            train, validation = (
                _dataset(file, part, encoded["reports"][part]) if part in encoded["reports"] else None for part in PARTS
            )
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"the encoded rows in {path} cannot be read ({error})") from error
    if train is None:
        raise ValueError(f"the encoded rows in {path} cannot be read (there are none)")
    return (train, validation), encoded["about"]


def _dataset(file: Any, part: str, report: dict[str, Any]) -> Dataset:
    ids, mask, ends = (file.get_tensor(f"{part}.{name}").tolist() for name in ("ids", "mask", "ends"))
    examples = [Example(ids[start:end], mask[start:end]) for start, end in pairwise([0, *ends])]
    return Dataset(examples, _report(report, tuple(len(example.ids) for example in examples)))


def _report_values(report: DatasetReport) -> dict[str, Any]:
    """Return its fields but for the lengths, which the examples have."""
    values = asdict(report)
    del values["lengths"]
    return values | {"by_number": any(isinstance(line, RowNumber) for line in report.unlabelled)}


def _report(values: dict[str, Any], lengths: tuple[int, ...]) -> DatasetReport:
    number = RowNumber if values.pop("by_number") else int
    values["unlabelled"] = tuple(map(number, values["unlabelled"]))
    values["ignored_columns"] = tuple(values["ignored_columns"])
    return DatasetReport(**values, lengths=lengths)
