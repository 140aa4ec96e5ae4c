"""An adapter merged into its base: a model directory that transformers and vLLM load like any other.

vLLM serves no DoRA adapter; this is how it gets one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.dora import weight_of
from lora_core.adapters.peft_format import read_adapter
from lora_core.adapters.targets import AdaptableModules
from lora_core.models.base import BaseModel
from lora_core.models.checks import BaseModelError
from lora_core.models.files import write_dense


def write_merged(base: BaseModel, adapter: str | Path, out: str | Path) -> None:
    """Write config, tokenizer and weights W + scale B A (DoRA: each row times m / norm) below `out`, in the dtype of
    the base; `adapter` is a PEFT directory.

    The sum is taken in fp32 and rounded once. The whole model is in memory twice until it is written.

    Raises:
        AdapterFormatError: the directory holds no adapter of this base.
        BaseModelError: the base is quantised.
    """
    if base.is_quantised:
        raise BaseModelError(f"a base in {base.precision} has no weights to merge into: load it in bf16 or fp32")
    adaptable = AdaptableModules(base.model)
    read = read_adapter(Path(adapter), adaptable)
    merged = {f"{name}.weight": _merged_weight(read, adaptable.modules[name], name) for name in read.a}
    Path(out).mkdir(parents=True, exist_ok=True)
    write_dense(base.model, Path(out), merged)
    base.tokenizer.save_pretrained(out)


@torch.no_grad()
def _merged_weight(adapter: Adapter, linear: nn.Module, module: str) -> Tensor:
    weight = weight_of(linear)
    a, b = (part.to(weight.device) for part in adapter.folded(module))
    wide = torch.promote_types(weight.dtype, a.dtype)
    total = weight.to(wide) + b.to(wide) @ a.to(wide)
    if module in adapter.magnitude:
        norm = torch.linalg.vector_norm(total, dim=1).clamp_min(torch.finfo(wide).tiny)
        total *= (adapter.magnitude[module].to(weight.device, wide) / norm)[:, None]
    return (total.t() if isinstance(linear, Conv1D) else total).to(weight.dtype)
