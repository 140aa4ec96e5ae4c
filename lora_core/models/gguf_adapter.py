"""An adapter as llama.cpp loads it beside its base: `llama-server -m base.gguf --lora adapter.gguf`.

blk.<layer>.<linear>.weight.lora_a  [r, in]      A
blk.<layer>.<linear>.weight.lora_b  [out, r]     B, by which llama.cpp adds adapter.lora.alpha / r * B A
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

from lora_core.adapters.adapter import Adapter
from lora_core.models.checks import BaseModelError

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""llama.cpp's names of the families that the decoder here knows, by transformers'."""


def write_gguf_adapter(config: Any, adapter: Adapter, path: Path) -> None:
    """Write an adapter of a base with this config, in fp32.

    Raises:
        BaseModelError: llama.cpp could not add it to this base, and why.
    """
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise BaseModelError(f"adapters are written as GGUF for {known}, not for {config.model_type}; export as tar")
    if adapter.magnitude:
        raise BaseModelError("llama.cpp knows no DoRA; export it merged into its base")
    folded = {module: adapter.folded(module) for module in adapter.a}
    alpha = max(a.shape[0] for a, _ in folded.values())
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    for module, (a, b) in folded.items():
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None:
            raise BaseModelError(f"llama.cpp has no name for {module}; export it merged into its base")
        rows = b * (a.shape[0] / alpha)
        if architecture is gguf.MODEL_ARCH.LLAMA and module.endswith(("q_proj", "k_proj")):
            rows = _interleaved(rows, _heads(config, module))
        writer.add_tensor(f"{name}.lora_a", a.float().contiguous().numpy())
        writer.add_tensor(f"{name}.lora_b", rows.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _heads(config: Any, module: str) -> int:
    heads: int = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
    return heads


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """Return the rows of each head as llama.cpp rotates them: neighbours are a pair. Transformers has the first of all
    pairs, then the second of all.
    """
    return rows.reshape(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
