"""Answering on one GPU, many adapters on one base: `python -m tests.bench.serve_gpu`.

Random weights in the shape of Llama, adapters of r 16 on all linears, sequences of `--tokens` tokens, greedy. Parts, of
which `--only` chooses:

    decode    a step of N sequences with K different adapters: GPU time of its graph, the engine's whole step beside it
    prompts   64 prompts of `--tokens` tokens, one token each, with 64 adapters and with none
    peft      PEFT's `generate` with one adapter, in its best batch of 1, 8 and 64, and without adapter

The floor of a step is its bytes (weights and head, keys and values, each adapter once) over the rate of a copy; of
prompts it is their products and those of attention over the rate of products. Both rates are measured first.
"""

from __future__ import annotations

import json
import statistics
import time

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_core.adapters.adapter import Adapter
from lora_core.inference.engine import Generator
from lora_core.inference.generation import GenerationRequest
from lora_core.inference.sampling_params import SamplingParams
from lora_core.models.base import BaseModel, placed
from lora_core.models.forward import open_forward
from lora_core.models.llama.adapters import KernelArgs
from lora_core.models.llama.forward import LlamaForward
from lora_core.models.precision import Fp8Weight
from tests.bench.options import bench_parser, head_of, some_of
from tests.bench.peers import random_llama, with_peft
from tests.bench.report import copy_rate, free_memory, matmul_rate, product_parameters, seconds_of

RANK, ANSWER = 16, 96
PROMPT_TOKENS = 8192  # read at a time, also beside answers, so that all sequences are about as long
CASES = ((64, 0), (64, 1), (64, 8), (64, 64), (8, 0), (8, 8), (1, 0), (1, 1), (256, 0), (256, 64))
PARTS = ("decode", "prompts", "peft")


class NoText(PreTrainedTokenizerBase):
    """Stands for a tokenizer where answers are ids."""

    def decode(self, *_: object, **__: object) -> str:
        return ""


class Served:
    """A base of this shape in one precision, a generator, and as many random adapters as are asked for."""

    def __init__(self, shape: str, device: torch.device, precision: str, tokens: int) -> None:
        model = random_llama(shape, device, "lora")
        self.parameters = product_parameters(model)
        self.base = placed(BaseModel(model, NoText(), "random", "0" * 64, precision, device), device)
        forward = open_forward(self.base, "llama")
        assert isinstance(forward, LlamaForward)
        self.forward, self.tokens = forward, tokens
        self.generator = Generator(
            self.base, forward, max_len=tokens + ANSWER, prefill_tokens=PROMPT_TOKENS, mixed_tokens=PROMPT_TOKENS
        )
        self.adapters: list[KernelArgs] = []
        self._stream = torch.Generator().manual_seed(0)

    def adapter(self, index: int) -> KernelArgs:
        while len(self.adapters) <= index:
            self.adapters.append(self._random())
        return self.adapters[index]

    def _random(self) -> KernelArgs:
        device, linears = self.base.device, self.forward.modules.linears
        shapes = {name: (linear.in_features, linear.out_features) for name, linear in linears.items()}
        a, b = (
            {
                name: torch.randn(*shape_of(sizes), device=device, dtype=torch.bfloat16) * 0.02
                for name, sizes in shapes.items()
            }
            for shape_of in (lambda s: (RANK, s[0]), lambda s: (s[1], RANK))
        )
        return self.forward.load(Adapter(dict.fromkeys(shapes, 2.0), a, b))

    def add(self, sequences: int, adapters: int, answer: int) -> None:
        """Queue prompts that nobody has sent before, the sequences of one adapter side by side."""
        vocabulary = self.base.model.config.vocab_size
        for index in range(sequences):
            prompt = torch.randint(vocabulary, (self.tokens,), generator=self._stream).tolist()
            adapter = self.adapter(index * adapters // sequences) if adapters else None
            sampling = SamplingParams(temperature=0.0)
            self.generator.add(GenerationRequest(prompt=prompt, adapter=adapter, sampling=sampling, max_tokens=answer))

    def run(self) -> None:
        """To the end of all answers."""
        while self.generator.running or self.generator.waiting:
            self.generator.step()

    def frozen_bytes(self) -> int:
        """Weights of all linears and the head, as one pass reads them: fp8 is there transposed, too."""
        decoder = self.forward.decoder
        weights = [weight for layer in decoder.layers for weight in layer.weights]
        return decoder.head.nbytes + sum(w.nbytes // (2 if isinstance(w, Fp8Weight) else 1) for w in weights)

    def adapter_bytes(self) -> int:
        """Of one."""
        linears = self.forward.modules.linears.values()
        return sum(2 * RANK * (linear.in_features + linear.out_features) for linear in linears)

    def token_bytes(self) -> int:
        """Keys and values of one token."""
        decoder = self.forward.decoder
        return 2 * len(decoder.layers) * decoder.kv_heads * decoder.head_size * 2


def decode(served: Served, copied: float, quick: bool) -> list[dict[str, object]]:
    """Rows of the table of steps."""
    rows = []
    for sequences, adapters in CASES[: 8 if quick else None]:
        served.add(sequences, adapters, ANSWER)
        while served.generator.waiting or served.generator._scheduler.reading:
            served.generator.step()
        taken = [_seconds(served.generator.step) for _ in range(24)]
        graphs = served.forward._graphs
        assert graphs is not None
        shape = graphs.last_shape
        replayed = _replay_ms(graphs._graphs[shape].graph)
        context = sum(len(live.ids) for live in served.generator._live.values())
        nbytes = served.frozen_bytes() + context * served.token_bytes() + adapters * served.adapter_bytes()
        floor = nbytes / copied * 1e3
        served.run()
        rows.append({
            "sequences": sequences, "adapters": adapters, "step_ms": round(replayed, 3), "floor_ms": round(floor, 3),
            "ratio": round(replayed / floor, 3), "engine_ms": round(statistics.median(taken) * 1e3, 3),
            "tokens_per_second": round(sequences / statistics.median(taken)),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def _seconds(action: object) -> float:
    began = time.perf_counter()
    action()  # type: ignore[operator]  # a step ends by reading its tokens
    return time.perf_counter() - began


def _replay_ms(graph: torch.cuda.CUDAGraph, times: int = 30) -> float:
    """Median GPU time of a replay."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for _ in range(3):
        graph.replay()
    for began, ended in events:
        began.record()
        graph.replay()
        ended.record()
    torch.cuda.synchronize()
    return statistics.median(began.elapsed_time(ended) for began, ended in events)


def prompts(served: Served, flops: float) -> list[dict[str, object]]:
    """Rows of the table of prompts."""
    rows = []
    sequences, tokens = 64, served.tokens
    decoder = served.forward.decoder
    attention = 2 * 2 * decoder.heads * decoder.head_size * len(decoder.layers) * tokens * tokens / 2 * sequences
    head = decoder.head.numel()
    floor = (2 * (served.parameters - head) * tokens * sequences + 2 * head * sequences + attention) / flops
    for adapters in (0, 64):
        seconds = []
        for _ in range(4):
            served.add(sequences, adapters, 1)
            seconds.append(seconds_of(served.run, served.base.device))
        taken = statistics.median(seconds[1:])
        rows.append({
            "prompts": sequences, "adapters": adapters, "tokens_per_second": round(sequences * tokens / taken),
            "seconds": round(taken, 4), "of_floor": round(floor / taken, 3),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def peft_rows(shape: str, device: torch.device, tokens: int) -> list[dict[str, object]]:
    """PEFT's `generate`: ms a token of the batch after the prompt, tokens/s together."""
    rows = []
    model: PreTrainedModel = random_llama(shape, device)
    adapted = with_peft(model).eval()
    for adapter, batches in ((True, (1, 8, 64)), (False, (64,))):
        for batch in batches:
            ids = torch.randint(model.config.vocab_size, (batch, tokens), device=device)

            def generate(new: int, ids: torch.Tensor = ids) -> None:
                adapted.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
                    min_new_tokens=new, pad_token_id=0, use_cache=True,
                )  # fmt: skip

            with torch.inference_mode():
                if not adapter:
                    adapted.disable_adapter_layers()
                generate(2)
                one, many = (seconds_of(lambda new=new: generate(new), device) for new in (2, 18))
            step = (many - one) / 16
            rows.append({"sequences": batch, "adapters": int(adapter), "step_ms": round(step * 1e3, 2),
                         "tokens_per_second": round(batch / step)})  # fmt: skip
            print("peft", rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure what the command line asks for."""
    parser = bench_parser(__doc__, tokens=512, of="of a prompt")
    parser.add_argument("--only", type=some_of(PARTS), default=PARTS)
    parser.add_argument("--precisions", type=some_of(("bf16", "fp8", "nf4")), default=("bf16", "fp8"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    copied, flops = copy_rate(device), matmul_rate(device)
    result = head_of("serve_gpu", arguments, device) | {"copy_TB_s": copied / 1e12, "bf16_TFLOP_s": flops / 1e12}
    print(result, flush=True)
    for precision in arguments.precisions:
        served = Served(arguments.shape, device, precision, arguments.tokens)
        if "decode" in arguments.only:
            result[f"decode {precision}"] = decode(served, copied, arguments.quick)
        if "prompts" in arguments.only:
            result[f"prompts {precision}"] = prompts(served, flops)
        served.forward.close()
        del served
        free_memory()
    if "peft" in arguments.only:
        result["peft"] = peft_rows(arguments.shape, device, arguments.tokens)
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
