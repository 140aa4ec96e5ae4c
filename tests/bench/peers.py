"""PEFT as its users run it, and PEFT as a careful user could: compiled layers and a loss that never holds all logits.

Both keep PEFT's defaults: A and B in fp32 on a bf16 base, r 16 on all linears; gradients are clipped, AdamW is fused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.bench.report import Step

LEARNING_RATE, MAX_GRAD_NORM = 2e-4, 1.0
IGNORED = -100
SLICE_ROWS = 2048  # at a vocabulary of 128 K: 1 GB of fp32 logits at a time

_LLAMA3: dict[str, Any] = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, **_LLAMA3},
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True, **_LLAMA3
    },
    # More layers than torch compiles variants of one function, so that a compilation for every layer would show.
    "tiny": {
        "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 12, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    },
}  # fmt: skip
"""Llama 3.1 8B, Llama 3.2 1B, and one to try this program on a CPU."""


def empty_llama(shape: str, attention: str = "sdpa") -> PreTrainedModel:
    """A bf16 model of that shape without weights."""
    config = LlamaConfig(**SHAPES[shape], use_cache=False)
    config._attn_implementation = attention
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def random_llama(shape: str, device: torch.device, attention: str = "sdpa") -> PreTrainedModel:
    """Frozen, with weights from N(0, 0.02), filled on the device."""
    model = empty_llama(shape, attention).to_empty(device=device)
    model.tie_weights()  # two tensors after to_empty
    stream = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=stream)
            else:
                parameter.fill_(1.0)
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config).to(device)  # its buffers come with no checkpoint
    return model.requires_grad_(False)


def with_peft(base: PreTrainedModel, dora: bool = False) -> peft.PeftModel:
    """The base with PEFT's adapter, in training mode."""
    base.config.use_cache = False
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=dora)
    model = peft.get_peft_model(base, config)
    return model.train()


def set_checkpointing(model: peft.PeftModel, enabled: bool) -> None:
    """Recompute each layer's activations in the backward pass, or keep them."""
    if enabled:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def settings(model: peft.PeftModel) -> Iterator[tuple[str, bool, bool]]:
    """The model in each of its settings in turn: what a row's title says of it, checkpointing, autocast."""
    for checkpointing, autocast in itertools.product((True, False), repeat=2):
        set_checkpointing(model, checkpointing)
        yield f"{', checkpointing' * checkpointing}{', autocast' * autocast}", checkpointing, autocast


def stock_step(model: peft.PeftModel, ids: Tensor, *, autocast: bool, at_once: int | None = None) -> Step:
    """One step on int64 `[documents, tokens]`, accumulated over micro-batches of `at_once` of them (None: one of all).
    Without autocast PEFT multiplies by A and B in fp32.
    """
    batches = ids.split(at_once or len(ids))
    turns = itertools.cycle(batches)

    def loss() -> Tensor:
        batch = next(turns)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=autocast):
            return model(input_ids=batch, labels=batch).loss

    return _train_step(model, loss, len(batches))


def padded_steps(
    model: peft.PeftModel, batches: Sequence[Sequence[int]], device: torch.device, *, autocast: bool
) -> Step:
    """A step on each of these batches, one after another. A batch is its documents' lengths: each is padded to the
    longest.
    """
    turns = itertools.cycle([_padded(lengths, model.config.vocab_size, device) for lengths in batches])

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return model(**next(turns)).loss

    step = _train_step(model, loss)

    def steps() -> None:
        for _ in batches:
            step()

    return steps


def _padded(lengths: Sequence[int], vocabulary: int, device: torch.device) -> dict[str, Tensor]:
    """What a collator gives the model: each `[documents, tokens of the longest]`."""
    there = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
    ids = torch.randint(0, vocabulary, there.shape, device=device)
    return {
        "input_ids": ids.masked_fill(~there, 0),
        "attention_mask": there.long(),
        "labels": ids.masked_fill(~there, IGNORED),
    }


def compiled_step(model: peft.PeftModel, ids: Tensor) -> Step:
    """The same with every decoder layer compiled and a chunked loss, whose slices are compiled too; under autocast."""
    causal = model.get_base_model()
    for layer in causal.model.layers:
        layer.compile(dynamic=False)
    slice_loss = torch.compile(_slice_loss, dynamic=False)
    labels = F.pad(ids[:, 1:], (0, 1), value=IGNORED).reshape(-1)

    def loss() -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16):
            hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state
            return _ChunkedLoss.apply(hidden.flatten(0, 1), causal.lm_head.weight, labels, slice_loss)

    return _train_step(model, loss)


def _train_step(model: peft.PeftModel, loss: Callable[[], Tensor], micro_batches: int = 1) -> Step:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)

    def step() -> None:
        for _ in range(micro_batches):
            (loss() / micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


class _ChunkedLoss(torch.autograd.Function):
    """hidden `[rows, h]`, the frozen head's weight `[vocabulary, h]`, labels `[rows]` -> the mean loss of a token.

    The head is frozen, so each slice's gradient with respect to its hidden states can be taken at once.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, slice_loss: Callable[..., Any]) -> Tensor:
        slices = [
            slice_loss(rows, weight, wanted)
            for rows, wanted in zip(hidden.split(SLICE_ROWS), labels.split(SLICE_ROWS), strict=True)
        ]
        count = (labels != IGNORED).sum()
        ctx.save_for_backward(torch.cat([gradient for _, gradient in slices]), count)
        return torch.stack([loss for loss, _ in slices]).sum() / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, count = ctx.saved_tensors
        return gradient * (grads[0] / count).to(gradient.dtype), None, None, None


def _slice_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of a few rows and its gradient with respect to them: `(softmax(logits) - one_hot(labels)) weight`."""
    log_p = (hidden @ weight.t()).float().log_softmax(-1)
    known = labels != IGNORED
    loss = -(log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0] * known).sum()
    one_hot = torch.arange(weight.shape[0], device=labels.device) == labels[:, None]
    dlogits = (log_p.exp() - one_hot.float()) * known[:, None]
    return loss, dlogits.to(hidden.dtype) @ weight
