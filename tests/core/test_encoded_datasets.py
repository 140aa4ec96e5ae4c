"""What is written of encoded data sets is what is read, and nothing else is taken for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from lora_core.data.dataset import Dataset, build_examples
from lora_core.data.encoded_datasets import read_datasets, write_datasets
from lora_core.data.format import RowNumber
from tests.support.rows import chat, numbered
from tests.support.tiny_models import byte_tokenizer

OPTIONS: dict[str, Any] = {"max_seq_len": 60, "train_on": "completion", "overlong": "truncate"}


def dataset(*contents: str) -> Dataset:
    """Of chats in which the first of two says one of `contents`."""
    rows = numbered(*[{**chat(content, "yes"), "source": "x"} for content in contents])
    return build_examples(rows, byte_tokenizer(), **OPTIONS)


@pytest.mark.parametrize("held_out", [False, True])
def test_data_sets_come_back_as_they_were_written(tmp_path: Path, held_out: bool) -> None:
    train = dataset("a", "x" * 80, "bcd")
    assert train.report.unlabelled == (2,)
    other = dataset("e", "y" * 80)
    other = replace(other, report=replace(other.report, unlabelled=(RowNumber(2),)))
    datasets = train, other if held_out else None
    for name in ("one", "two"):
        write_datasets(datasets, tmp_path / name, {"template": "t"})
    found, about = read_datasets(tmp_path / "one")
    assert found == datasets and about == {"template": "t"}
    assert [part and part.report.lines() for part in found] == [part and part.report.lines() for part in datasets]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    tokens = sum(part.report.tokens for part in datasets if part is not None)
    assert (tmp_path / "one").stat().st_size < 5 * tokens + 2000


def test_another_file_is_not_taken_for_one(tmp_path: Path) -> None:
    save_file({}, tmp_path / "other", {"encoded": '{"reports": {}, "about": null}'})
    save_file({}, tmp_path / "plain")
    (tmp_path / "cut").write_bytes(b"cut")
    for name in ("other", "plain", "cut", "none"):
        with pytest.raises(ValueError, match=rf"^the encoded rows in .*/{name} cannot be read"):
            read_datasets(tmp_path / name)
