"""Tiny random bases of every family, and documents to train on: no files, no downloads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_core.attention import ATTENTION_NAME
from lora_core.base_model import BaseModel
from lora_core.dataset import Example

VOCABULARY = 96
CPU = torch.device("cpu")

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ODD = {"hidden_size": 50, "intermediate_size": 75, "num_attention_heads": 5, "num_key_value_heads": 5}
"""Widths that are no multiple of a vector register: rounding then depends on alignment and on the number of rows."""

_GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**_LLAMA),
    "llama-odd": transformers.LlamaConfig(**_LLAMA | _ODD),
    "mistral": transformers.MistralConfig(**_LLAMA, sliding_window=7),
    "mistral-dense": transformers.MistralConfig(**_LLAMA, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**_LLAMA),
    "qwen3": transformers.Qwen3Config(**_LLAMA, head_dim=16),
    "gemma": transformers.GemmaConfig(**_LLAMA, head_dim=16),
    "gemma2": transformers.Gemma2Config(
        **_LLAMA, head_dim=16, sliding_window=7, attn_logit_softcapping=3.0, final_logit_softcapping=5.0
    ),
    "gemma2-untied": transformers.Gemma2Config(
        **_LLAMA, head_dim=16, sliding_window=7, final_logit_softcapping=5.0, tie_word_embeddings=False
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **_LLAMA, head_dim=16, sliding_window=7, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": transformers.GPT2Config(**_GPT2, bos_token_id=1, eos_token_id=2),
}


def tiny_model(kind: str, seed: int = 0, attention: str = ATTENTION_NAME) -> PreTrainedModel:
    """Random weights and biases, large enough that attention, windows and caps show in the logits; frozen, in eval
    mode.
    """
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        copy.deepcopy(CONFIGS[kind]), attn_implementation=attention
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0, 0.3)
    return model.eval().requires_grad_(False)


def tiny_base(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> BaseModel:
    """`tiny_model` as the engine takes it; in fp64 with norms that compute in fp64 too."""
    model = tiny_model(kind, seed).to(dtype)  # type: ignore[arg-type]
    if dtype == torch.float64:
        norms_in_double(model)
    tokenizer = PreTrainedTokenizerBase()
    return BaseModel(model, tokenizer, f"tiny-{kind}", "0" * 64, "bf16" if dtype == torch.bfloat16 else "fp32", CPU)


def norms_in_double(model: nn.Module) -> None:
    """transformers' RMSNorm computes in fp32 whatever it gets, which would hide what fp64 is to show."""

    def rms_norm(self: Any, x: Tensor) -> Tensor:
        normed: Tensor = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))
        return normed

    for module in model.modules():
        if type(module).__name__ in ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm"):
            module.forward = MethodType(rms_norm, module)  # type: ignore[method-assign]


def documents(count: int, seed: int, shortest: int = 4, longest: int = 30) -> list[Example]:
    """Random documents, each supervised from a random token on, so that counts of supervised tokens are uneven."""
    stream = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=stream))

    examples = []
    for _ in range(count):
        length = draw(shortest, longest)
        prompt = draw(1, length - 1)
        ids = torch.randint(3, VOCABULARY, (length,), generator=stream).tolist()
        examples.append(Example(ids, [False] * prompt + [True] * (length - prompt)))
    return examples


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's threads inside an operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
