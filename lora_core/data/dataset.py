"""A data set, ready for training: examples no longer than allowed, and a report of what they come to.

    rows = read_rows(path)                                              files.py: lines, or numbers of rows
    check_rows(rows, formats)                                           format.py: columns, mistakes
    train, validation = split(len(rows), fraction, seed)
    dataset = build_examples([rows[i] for i in train], tokenizer, ...)  encoding.py: ids and loss mask
    build_datasets(path, fraction_or_path, tokenizer, config)           all of it

A row too long for `max_seq_len` is truncated or dropped, and counted. A row that has no supervised token then is named,
and a data set that has none is refused: its loss would be 0 / 0. So is a pair of answers, of which one has none or that
are the same by then. A pair is two examples side by side, the preferred one first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from lora_core.config import TrainConfig
from lora_core.data.encoding import Example, TrainOn, encode_pairs, encode_rows
from lora_core.data.files import read_rows
from lora_core.data.format import (
    FORMATS,
    PREFERENCES,
    REQUIRED_COLUMNS,
    DatasetError,
    Formats,
    NumberedRow,
    RowFormat,
    RowNumber,
    check_rows,
    ignored_columns,
    location,
)
from lora_core.data.json_values import shown

__all__ = [
    "Dataset",
    "DatasetError",
    "DatasetReport",
    "Example",
    "build_datasets",
    "build_examples",
    "check_rows",
    "read_rows",
    "split",
]

Overlong = Literal["truncate", "drop"]

NAMED_ROWS = 100


@dataclass(frozen=True)
class DatasetReport:
    """What a data set comes to in tokens of this tokenizer, before anything is trained.

    `lengths` are the examples' tokens, in order; `longest` is the longest one's before truncation. `overlong` counts
    the rows with an example longer than `max_seq_len`, which `overlong_rule` truncated or dropped. `unlabelled` are the
    lines, or numbers, of rows that train nothing.
    """

    format: RowFormat
    rows: int
    lengths: tuple[int, ...]
    supervised_tokens: int
    longest: int
    max_seq_len: int
    overlong: int
    overlong_rule: Overlong
    unlabelled: tuple[int, ...]
    ignored_columns: tuple[str, ...]

    @property
    def has_pairs(self) -> bool:
        """Whether the rows are preferences."""
        return self.format in PREFERENCES

    @property
    def examples(self) -> int:
        """Documents to train on: one a row, or one an answer where the template rewrites history; or pairs of them."""
        return len(self.lengths) // (2 if self.has_pairs else 1)

    @property
    def tokens(self) -> int:
        """Tokens of one epoch."""
        return sum(self.lengths)

    def packing_efficiency(self, capacity: int) -> float:
        """Return the share of tokens in micro-batches of `capacity` that are no padding, the examples in file order."""
        laid = batch = 0
        for length in self.lengths:
            if batch + length > capacity:
                laid += max(batch, capacity) if batch else 0
                batch = 0
            batch += length
        return self.tokens / (laid + max(batch, capacity))

    def lines(self) -> list[str]:
        """Write the report for people."""
        return self.contents() + self.losses()

    def contents(self) -> list[str]:
        """Say what there is to train on."""
        share = self.supervised_tokens / self.tokens
        packing = f"{self.packing_efficiency(self.max_seq_len):.1%} at {self.max_seq_len:,} tokens"
        return [
            f"{self.rows:,} rows of {self.format}, {self.examples:,} {'pairs' if self.has_pairs else 'examples'}",
            f"{self.tokens:,} tokens, {self.supervised_tokens:,} of them supervised ({share:.1%})",
            f"longest row {self.longest:,} tokens, packing efficiency {packing}",
        ]

    def losses(self) -> list[str]:
        """Say what of the file is not trained, or not whole."""
        lines = []
        if self.overlong:
            done = "truncated" if self.overlong_rule == "truncate" else "dropped"
            lines.append(f"{self.overlong:,} rows longer than max_seq_len={self.max_seq_len:,} tokens: {done}")
        if self.unlabelled:
            lacking = "two answers to tell apart" if self.has_pairs else "a supervised token"
            lines.append(f"{len(self.unlabelled):,} rows without {lacking}: {_named(self.unlabelled)}")
        if self.ignored_columns:
            lines.append(f"ignored columns: {', '.join(shown(name) or '(no name)' for name in self.ignored_columns)}")
        return lines


@dataclass(frozen=True)
class Dataset:
    """Examples in the order of the file, and what they come to."""

    examples: list[Example]
    report: DatasetReport


def build_examples(
    rows: Sequence[NumberedRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    train_on: TrainOn,
    overlong: Overlong,
    token_rows: int | None = None,
    formats: Formats = REQUIRED_COLUMNS,
) -> Dataset:
    """Make token ids and loss masks of all rows, of one of `formats`, none longer than `max_seq_len`, each ending with
    a label.

    Over-long examples lose their end, or are left out, as `overlong` says. `token_rows` is what the base model has of
    them (None: not known): ids from there on are refused.

    Raises:
        DatasetError: what `check_rows` and `encode_rows` find, tokens that the model has no row for, or no supervised
            token in any row.
    """
    row_format = check_rows(rows, formats)
    problems: list[str] = []
    examples: list[Example] = []
    labelled: set[int] = set()
    overlong_lines: set[int] = set()
    longest = 0
    for line, documents in _encoded(rows, row_format, tokenizer, train_on):
        most = max(len(document.ids) for document in documents)
        longest = max(longest, most)
        if most > max_seq_len:
            overlong_lines.add(line)
            if overlong == "drop":
                continue
            documents = [_truncated(document, max_seq_len) for document in documents]
        ids = [token for document in documents for token in document.ids]
        if token_rows is not None and (beyond := [token for token in ids if token >= token_rows]):
            problems.append(f"{location(line)}: {_rowless(tokenizer, beyond[0], token_rows)}")
        if all(document.ids for document in documents) and (len(documents) == 1 or documents[0] != documents[1]):
            examples += documents
            labelled.add(line)
    if problems:
        raise DatasetError(problems)
    report = DatasetReport(
        format=row_format,
        rows=len(rows),
        lengths=tuple(len(example.ids) for example in examples),
        supervised_tokens=sum(sum(example.labels_mask) for example in examples),
        longest=longest,
        max_seq_len=max_seq_len,
        overlong=len(overlong_lines),
        overlong_rule=overlong,
        unlabelled=tuple(line for line, _ in rows if line not in labelled),
        ignored_columns=ignored_columns(rows, row_format),
    )
    if not examples:
        raise DatasetError([_nothing_to_learn(report)])
    return Dataset(examples, report)


def build_datasets(
    dataset: str | Path,
    validation: float | str | Path | None,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    token_rows: int | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Build the examples to train on, and those to validate on: of a second file, or of a fraction of the rows.
    `token_rows` is what the base model has of them, where that is known.

    Raises:
        DatasetError: what `read_rows`, `build_examples` and `split` find.
    """

    formats = FORMATS[config.method]

    def build(rows: Sequence[NumberedRow]) -> Dataset:
        return build_examples(
            rows,
            tokenizer,
            max_seq_len=config.max_seq_len,
            train_on=config.train_on,
            overlong=config.overlong,
            token_rows=token_rows,
            formats=formats,
        )

    if isinstance(validation, float):
        rows = read_rows(dataset, formats=formats)
        check_rows(rows, formats)  # before the split, so that mistakes on either side come together
        training, validating = split(len(rows), validation, config.seed)
        return build(rows.part(training)), build(rows.part(validating))
    built: list[Dataset] = []
    problems: list[str] = []
    for path, prefix in ((dataset, ""), (validation, "validation: ")):
        try:
            built += [] if path is None else [build(read_rows(path, formats=formats))]
        except DatasetError as error:
            problems += [prefix + problem for problem in error.problems]
    if problems:
        raise DatasetError(problems)
    return built[0], built[1] if validation is not None else None


def split(rows_count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return (training, validation) indices of rows, each ascending; the same for the same arguments everywhere.

    Split rows, not examples: turns of one conversation on both sides would flatter the validation loss.

    Raises:
        DatasetError: fewer than two rows.
    """
    if rows_count < 2:
        raise DatasetError(["a validation fraction needs at least two rows; add rows, or leave `validation` out"])
    order = sorted(range(rows_count), key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest())
    validating = min(max(1, round(rows_count * fraction)), rows_count - 1)
    return sorted(order[validating:]), sorted(order[:validating])


def _encoded(
    rows: Sequence[NumberedRow], row_format: RowFormat, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn
) -> list[tuple[int, list[Example]]]:
    """Return what belongs together of each line: a document, or a pair of them."""
    if row_format in PREFERENCES:
        return encode_pairs(rows, row_format, tokenizer)
    return [(line, [example]) for line, example in encode_rows(rows, row_format, tokenizer, train_on)]


def _truncated(example: Example, tokens: int) -> Example:
    """Keep the first tokens up to the last label among them, since nothing learns from the rest: none without one."""
    end = min(tokens, len(example.ids))
    while end > 0 and not example.labels_mask[end - 1]:
        end -= 1
    return Example(example.ids[:end], example.labels_mask[:end])


def _rowless(tokenizer: PreTrainedTokenizerBase, token: int, token_rows: int) -> str:
    return (
        f"the token `{tokenizer.convert_ids_to_tokens(token)}` has the id {token}, and the base model's embedding"
        f" {token_rows} rows; change or leave out the row, or choose a base that knows the token"
    )


def _named(lines: Sequence[int]) -> str:
    rest = f" and {len(lines) - NAMED_ROWS:,} more" if len(lines) > NAMED_ROWS else ""
    word = "rows" if isinstance(lines[0], RowNumber) else "lines"
    return f"{word} {', '.join(map(str, lines[:NAMED_ROWS]))}{rest}"


def _nothing_to_learn(report: DatasetReport) -> str:
    reason = "every answer has weight 0; give those to learn weight 1"
    if report.has_pairs:
        reason = "both answers of each pair are the same tokens, or one has weight 0; write two that differ"
    if report.overlong:
        limit = f"raise max_seq_len={report.max_seq_len:,} or shorten the prompts"
        reason = f"the longest has {report.longest:,} tokens; {limit}"
    return f"no supervised token is left in {_named(report.unlabelled)}: {reason}"
