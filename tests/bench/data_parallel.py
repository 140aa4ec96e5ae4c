"""Training on several ranks against one, and against PEFT on as many: `python -m tests.bench.data_parallel`.

Every rank fills the same random base in the shape of Llama (nothing of it is sent) and takes its share of each job's
step, at most 8,192 tokens; so a step on N ranks has N times the documents. After it the gradients of A and B are summed
over the ranks, one message a job. PEFT runs under torch's DistributedDataParallel, each rank with the batch that is its
best on one GPU (`train_gpu`).

    one rank     while the others wait
    all ranks    the same jobs with as many documents on each rank
    figures      how far the first step of a batch differs between one rank and all; whether ranks end with equal bits
"""

from __future__ import annotations

import argparse
import hashlib
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from lora_core.models.attention import ATTENTION_NAME
from lora_core.models.base import BaseModel
from lora_core.training.engine import TrainEngine
from lora_core.training.optimizer import StepOutcome
from tests.bench.engines import base_of, bench_job, session_step
from tests.bench.options import bench_parser, conditions_of, head_of
from tests.bench.peers import SHAPES, empty_llama, random_llama, stock_step, with_peft
from tests.bench.report import OURS, PEFT, Conditions, Report, Row, Step, free_memory, peak_gib, time_steps
from tests.support.machine import free_port

STEP_TOKENS = 8192
JOBS = (1, 8)
PEFT_DOCUMENTS = 4


class Ranks:
    """This process among all: rank 0 reports what all of them did."""

    def __init__(self, rank: int, ranks: int, conditions: Conditions, head: dict[str, object]) -> None:
        self.rank, self.ranks, self.conditions = rank, ranks, conditions
        self._control = dist.new_group(backend="gloo")  # whoever waits in it leaves the GPUs alone
        self.report: Report | None = None
        if rank == 0:
            self.report = Report(head, conditions.device, empty_llama(conditions.shape))

    def wait(self) -> None:
        """Until all are here."""
        dist.barrier(self._control)

    def gathered(self, value: object) -> list[object]:
        """Every rank's."""
        found: list[object] = [None] * self.ranks
        dist.all_gather_object(found, value, self._control)
        return found

    def measure(self, case: str, who: str, workload: str, tokens: int, step: Step) -> None:
        """The time of a step that the calling ranks take together."""
        conditions = self.conditions
        free_memory()
        times = time_steps({case: step}, warm=conditions.warm, timed=conditions.timed, device=conditions.device)
        if self.report is not None:
            self.report.add(Row(case, who, workload, tokens, times[case], peak_gib(conditions.device)))

    def engine(self, base: BaseModel, alone: bool) -> TrainEngine:
        """One of this rank alone, or of all."""
        if alone:
            return TrainEngine(base, capacity=STEP_TOKENS)
        return TrainEngine(
            base, capacity=STEP_TOKENS, rank=self.rank, ranks=self.ranks, all_reduce=lambda t: dist.all_reduce(t)
        )


def run(rank: int, arguments: argparse.Namespace, port: int) -> None:
    """All that one rank does."""
    torch.set_num_threads(1)  # as Ray has it in a rank's worker
    device = torch.device(arguments.device, rank) if arguments.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=arguments.ranks)
    head = head_of("data_parallel", arguments, device, arguments.ranks)
    ranks = Ranks(rank, arguments.ranks, conditions_of(arguments, device), head)
    ours(ranks)
    free_memory()
    peft_on_all(ranks)
    if ranks.report is not None:
        ranks.report.finish()
    ranks.wait()
    dist.destroy_process_group()


def ours(ranks: Ranks) -> None:
    """One rank, then all, then both on one batch."""
    conditions = ranks.conditions
    base = base_of(random_llama(conditions.shape, conditions.device, ATTENTION_NAME), "bf16")
    for alone in (True, False):
        ranks.wait()
        if alone and ranks.rank > 0:
            continue
        engine, share = ranks.engine(base, alone), 1 if alone else ranks.ranks
        for jobs in JOBS:
            documents = max(1, STEP_TOKENS // (jobs * conditions.tokens)) * share
            step = session_step(engine, jobs, documents, conditions.tokens)
            case = f"ours, {share} rank{'s' * (share > 1)}, {jobs} x {documents} x {conditions.tokens}"
            workload = f"{share} ranks, {jobs} jobs"
            ranks.measure(case, OURS, workload, jobs * documents * conditions.tokens, step)
        if not alone:
            vectors = [live.optimizer.flat.cpu().numpy().tobytes() for live in engine.live.values()]
            same = len(set(ranks.gathered(hashlib.sha256(b"".join(vectors)).hexdigest()))) == 1
            sent = sum(len(vector) for vector in vectors) / 2**20
            if ranks.report is not None:
                ranks.report.figure("MiB summed over the ranks in a step of all jobs", sent)
                ranks.report.figure("1 if all ranks end with the same bits", float(same))
        engine.forward.close()
    _first_step_of_one_batch(ranks, base)


def _first_step_of_one_batch(ranks: Ranks, base: BaseModel) -> None:
    conditions, outcomes = ranks.conditions, []
    for alone in (True, False):
        ranks.wait()
        if alone and ranks.rank > 0:
            continue
        engine = ranks.engine(base, alone)
        documents = 2 * ranks.ranks + 1  # which divides unevenly
        engine.add(bench_job("one", documents, conditions.tokens, base.model.config.vocab_size))
        outcomes.append(engine.step()["one"])
        engine.forward.close()
    if ranks.report is not None:
        one, many = outcomes
        assert isinstance(one, StepOutcome) and isinstance(many, StepOutcome) and one.tokens == many.tokens
        ranks.report.figure("relative difference of the loss, one rank and all", abs(many.loss / one.loss - 1))
        norm = abs(many.grad_norm / one.grad_norm - 1)
        ranks.report.figure("relative difference of the gradient's norm, one rank and all", norm)


def peft_on_all(ranks: Ranks) -> None:
    """PEFT under DistributedDataParallel, activations kept, autocast."""
    conditions, count = ranks.conditions, ranks.ranks
    model = with_peft(random_llama(conditions.shape, conditions.device))
    ids = torch.randint(0, SHAPES[conditions.shape]["vocab_size"], (PEFT_DOCUMENTS, conditions.tokens))
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    step = stock_step(parallel, ids.to(conditions.device), autocast=True)
    case = f"peft, {count} ranks, autocast, {count} x {PEFT_DOCUMENTS} x {conditions.tokens}"
    ranks.measure(case, PEFT, f"{count} ranks, 1 jobs", count * ids.numel(), step)


def main() -> None:
    """Start the ranks."""
    parser = bench_parser(__doc__, tokens=1024, of="of a document")
    parser.add_argument("--ranks", type=int, default=max(2, torch.cuda.device_count()))
    arguments = parser.parse_args()
    processes.spawn(run, (arguments, free_port()), arguments.ranks)


if __name__ == "__main__":
    main()
