"""Activation checkpointing: save each decoder layer's input alone, and recompute the layer in the backward pass.

    forward     y = layer(x)                 saved: x
    backward    layer(x) once more, with the segments that were routed then; from there as if nothing had been left out

Bit for bit the same as without in eager fp32: the second pass has the same rows, weights and dropout masks (they are
functions of keys), and A's and B's gradients are added up in the backward pass alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_core.models.hooks.bank import AdapterBank


@contextmanager
def recomputed_layers(model: PreTrainedModel, bank: AdapterBank) -> Iterator[None]:
    """Within it, forward passes that grow a graph keep the inputs of decoder layers only.

    The backward pass may come after it.
    """
    layers = decoder_layers(model)
    for layer in layers:
        layer.forward = _recomputed(layer.forward, bank)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the instance's; the class's shows again


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that transformers itself would checkpoint."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _recomputed(forward: Callable[..., Any], bank: AdapterBank) -> Callable[..., Any]:
    def recomputed_forward(*args: Any, **kwargs: Any) -> Any:
        segments = bank.segments

        def routed_forward(*inputs: Any, **options: Any) -> Any:
            with bank.routed(segments):  # in the backward pass no segment is routed any more
                return forward(*inputs, **options)

        # No torch randomness to repeat: dropout masks are functions of keys. The reentrant kind would need an input
        # with a gradient, which the first layer has not, as the embedding is frozen.
        return checkpoint(routed_forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return recomputed_forward
