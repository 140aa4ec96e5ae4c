"""Tokens/s of training on one GPU, this engine against PEFT in the same run: `python -m tests.bench.train_gpu`.

Random weights in the shape of Llama, r 16 on all linears, documents of `--tokens` random tokens, all supervised; a step
of ours has 8,192 tokens where a part does not say otherwise. Each part frees what it held before the next begins;
`--only` chooses parts:

    peft      PEFT as it is: with and without checkpointing and autocast, 1 to 8 documents a step, until memory ends
    compiled  PEFT with compiled layers and a chunked loss, with and without checkpointing
    ours      one job and eight jobs
    dora      the same with DoRA, ours in bf16 and PEFT as it is
    long      PEFT as it is, and ours, with documents four times as long
    mixed     documents of log-normal length up to `--tokens`; PEFT pads them, in batches as they come and by length
    curve     1/4, 1, 4 and 16 times `--tokens` a job and step: eight jobs together, and one at a time, ours and PEFT
    overhead  one job against the frozen model's own forward pass and input gradient
    most      64 live jobs
    sweep     1 to 32 jobs at the same tokens a step, with and without the optimizer's time
    swap      a job leaves a live session of eight and another takes its place
    join      jobs whose kernels are the first of their kind on a machine join eight, kernels warmed up or not
    ends      a checkpoint of one of eight jobs is written, and its adapter published, beside the others' steps
    first     the first step of a fresh process, with empty compile caches and with full ones

`ours`, our side of `long`, `mixed` and `curve`, and what follows them run in each of `--precisions`. Eight PEFT jobs
run one after another, so that their tokens/s are those of one job with one document a step.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable

import torch

from tests.bench import gpu_parts, length_parts
from tests.bench.options import bench_parser, conditions_of, head_of, some_of
from tests.bench.peers import (
    SHAPES,
    compiled_step,
    empty_llama,
    random_llama,
    set_checkpointing,
    settings,
    stock_step,
    with_peft,
)
from tests.bench.report import COMPILED, DORA, MANY_JOBS, ONE_JOB, PEFT, Conditions, Report, Step, measure

PARTS = (
    *("peft", "compiled", "ours", "dora", "long", "mixed", "curve"),
    *("overhead", "most", "sweep", "swap", "join", "ends", "first"),
)
CHILDREN = ("first", "warm", "cold")
PRECISIONS = ("bf16", "fp8")
DOCUMENTS = (1, 2, 4, 8)
COMPILED_DOCUMENTS = (1, 4, 8)  # each is compiled for up to a minute


def main() -> None:
    """Measure what the command line asks for."""
    arguments = _arguments()
    device = torch.device(arguments.device)
    conditions = conditions_of(arguments, device)
    torch.set_num_threads(1)  # as Ray has it in a rank's worker
    if arguments.child:
        print(json.dumps(_as_child(arguments.child, conditions, *arguments.precisions)))
        return
    # By default a function that was compiled eight times runs eagerly from then on, without a word.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    report = Report(head_of("train_gpu", arguments, device), device, empty_llama(conditions.shape))
    for name, part in _parts(report, conditions, arguments.precisions).items():
        if name.split()[0] in arguments.only:
            report.attempt(name, part)
            torch._dynamo.reset()
    report.finish()


def _arguments() -> argparse.Namespace:
    parser = bench_parser(__doc__, tokens=1024, of="of a document")
    parser.add_argument("--only", type=some_of(PARTS), default=PARTS, help="parts, by commas")
    parser.add_argument("--precisions", type=some_of(PRECISIONS), default=PRECISIONS, help="of our base, by commas")
    parser.add_argument("--child", choices=CHILDREN, help="what the parts 'join' and 'first' run in other processes")
    return parser.parse_args()


def _as_child(what: str, conditions: Conditions, precision: str) -> dict[str, float]:
    if what == "first":
        return gpu_parts.first_steps(conditions, precision)
    return gpu_parts.joins(conditions, precision, what == "warm")


def _parts(report: Report, conditions: Conditions, precisions: tuple[str, ...]) -> dict[str, Callable[[], None]]:
    """Every part by name; the first word is what `--only` calls it."""
    long = dataclasses.replace(conditions, tokens=4 * conditions.tokens)
    parts = {
        "peft": functools.partial(peft_as_it_is, report, conditions),
        "compiled": functools.partial(peft_compiled, report, conditions),
        "dora of PEFT": functools.partial(peft_as_it_is, report, conditions, dora=True),
        "dora of ours": functools.partial(gpu_parts.one_and_eight_jobs, report, conditions, "bf16", dora=True),
        "long of PEFT": functools.partial(peft_as_it_is, report, long),
        "mixed of PEFT": functools.partial(length_parts.peft_mixed, report, conditions),
        "curve of PEFT": functools.partial(length_parts.peft_curve, report, conditions),
    }
    ours = {
        "ours": gpu_parts.one_and_eight_jobs,
        "mixed": length_parts.mixed,
        "curve": length_parts.curve,
        "overhead": gpu_parts.overhead,
        "most": gpu_parts.most_jobs,
        "sweep": gpu_parts.sweep,
        "swap": gpu_parts.swap,
        "join": gpu_parts.join,
        "ends": gpu_parts.ends,
        "first": gpu_parts.first_step_latency,
    }
    for precision in precisions:
        for name, part in ours.items():
            parts[f"{name} {precision}"] = functools.partial(part, report, conditions, precision)
        parts[f"long {precision}"] = functools.partial(gpu_parts.one_and_eight_jobs, report, long, precision)
    return parts


def peft_as_it_is(report: Report, conditions: Conditions, dora: bool = False) -> None:
    """The batch grows until memory ends; rows that fail are named as such."""
    model = with_peft(random_llama(conditions.shape, conditions.device), dora)
    for setting, _, autocast in settings(model):
        make_step = functools.partial(stock_step, model, autocast=autocast)
        _growing_batch(report, conditions, f"peft{DORA * dora}{setting}", PEFT, make_step, dora)
    _eight_in_turn(report, conditions, PEFT, dora)


def peft_compiled(report: Report, conditions: Conditions) -> None:
    """Compiled anew for every batch, since a compiled function with a dynamic batch is slower."""
    model = with_peft(random_llama(conditions.shape, conditions.device))

    def freshly_compiled(ids: torch.Tensor) -> Step:
        torch._dynamo.reset()
        return compiled_step(model, ids)

    for checkpointing in (True, False):
        set_checkpointing(model, checkpointing)
        title = f"peft compiled{', checkpointing' * checkpointing}"
        _growing_batch(report, conditions, title, COMPILED, freshly_compiled)
    _eight_in_turn(report, conditions, COMPILED)


def _growing_batch(
    report: Report,
    conditions: Conditions,
    title: str,
    who: str,
    make_step: Callable[[torch.Tensor], Step],
    dora: bool = False,
) -> None:
    vocabulary = SHAPES[conditions.shape]["vocab_size"]
    for documents in COMPILED_DOCUMENTS if who == COMPILED else DOCUMENTS:
        ids = torch.randint(0, vocabulary, (documents, conditions.tokens), device=conditions.device)
        case = f"{title}, {documents} x {conditions.tokens}"
        workload, step = conditions.workload(ONE_JOB, dora), functools.partial(make_step, ids)
        if not measure(report, conditions, case, who, workload, ids.numel(), step):
            break


def _eight_in_turn(report: Report, conditions: Conditions, who: str, dora: bool = False) -> None:
    """The fastest way to give one job a step of one document, as a row for many jobs."""
    wanted = (who, conditions.workload(ONE_JOB, dora), conditions.tokens)
    rows = [row for row in report.rows if (row.who, row.workload, row.tokens) == wanted]
    if rows:
        fastest, workload = max(rows, key=lambda row: row.rate), conditions.workload(MANY_JOBS, dora)
        report.add(dataclasses.replace(fastest, case=f"eight jobs in turn: {fastest.case}", workload=workload))


if __name__ == "__main__":
    main()
