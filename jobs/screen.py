"""What a person sees who looks at a terminal: tables, bars, curves. What a script reads is plain lines.

`rich` draws, and is imported where somebody looks: it takes as long as the rest of a short command.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from jobs.job import JobProgress
from jobs.job_report import progress_text

PLAIN_SECONDS = 5.0  # between two lines of progress where nobody looks
BLOCKS = "▁▂▃▄▅▆▇█"

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""The names of columns, and rows."""


def show(*tables: Table) -> None:
    """Print tables; where nobody looks, their rows alone, in columns."""
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(*map(_drawn, tables), sep="\n")
        return
    for names, rows in tables:
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(len(names))]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_json(document: Any) -> None:
    """Print what `--json` asks for."""
    print(json.dumps(document, ensure_ascii=False, indent=2))


def refresh(tables: Callable[[], Sequence[Table]], seconds: float) -> None:
    """Show tables anew every so often while a person looks, until a Ctrl-C; else once."""
    if not sys.stdout.isatty():
        show(*tables())
        return
    from rich.console import Group
    from rich.live import Live

    with contextlib.suppress(KeyboardInterrupt), Live(screen=True, auto_refresh=False) as live:
        while True:
            live.update(Group(*map(_drawn, tables())), refresh=True)
            time.sleep(seconds)


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Draw a curve on one line, each character the mean of a part of it; what is no finite number is left out."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    size = min(width, len(finite))
    parts = [finite[len(finite) * n // size : len(finite) * (n + 1) // size] for n in range(size)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    return "".join(BLOCKS[int((mean - low) / ((high - low) or 1.0) * (len(BLOCKS) - 1) + 0.5)] for mean in means)


class ProgressBar:
    """How far a job is, on standard error: a bar below the other lines where a person looks, else a line now and
    then.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._shown = -math.inf
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._bar = Progress(
                BarColumn(24),
                TextColumn("{task.description}", markup=False),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=sys.stdout.isatty(),  # so that lines stand above the bar
                redirect_stderr=False,
            )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, progress: JobProgress) -> None:
        """Show this now, or in a while if something was shown just now and nobody looks."""
        text, step, steps = progress_text(progress), progress["step"], progress["steps"]
        if self._bar is not None:
            if not self._bar.tasks:
                self._bar.start()
                self._bar.add_task("", total=steps)
            self._bar.update(self._bar.task_ids[0], completed=step, description=text)
        elif time.monotonic() - self._shown > PLAIN_SECONDS:
            self._shown = time.monotonic()
            filled = 24 * step // steps
            print(f"[{'#' * filled}{'-' * (24 - filled)}] {text}", file=sys.stderr, flush=True)


def _drawn(table: Table) -> Any:
    from rich.table import Table as Drawn
    from rich.text import Text

    names, rows = table
    drawn = Drawn(*names, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        drawn.add_row(*map(Text, row))  # no markup: some cells are what users wrote
    return drawn
