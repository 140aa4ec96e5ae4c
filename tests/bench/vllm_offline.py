"""vLLM's offline `LLM` as `serve_cpu.py` asks it, in an environment that has vLLM: it answers the batches on stdin."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

# One process with all the threads, which sleep while another program has its turn.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main(setup: dict[str, Any]) -> None:
    """Load, say so, and answer batch after batch."""
    folders = setup["adapters"]
    llm = LLM(
        setup["model"],
        dtype=setup["dtype"],
        **({"enable_lora": True, "max_loras": len(folders), "max_lora_rank": 16} if folders else {}),
        max_model_len=512,
        max_num_seqs=64,
        enable_prefix_caching=False,
    )
    loras = [LoRARequest(f"adapter{number}", number, folder) for number, folder in enumerate(folders, start=1)]
    print("done", flush=True)
    for line in sys.stdin:
        batch = json.loads(line)
        rows, adapters, tokens = batch["ids"], batch["adapters"], batch["tokens"]
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=True)
        prompts = [{"prompt_token_ids": row} for row in rows]
        asked = [loras[row % adapters] for row in range(len(rows))] if adapters else None
        llm.generate(prompts, sampling, lora_request=asked, use_tqdm=False)
        print("done", flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
