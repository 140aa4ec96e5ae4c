"""What llama.cpp is given of an adapter is, read as transformers reads llama.cpp's files, the adapter."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from lora_core.adapters.adapter import Adapter
from lora_core.models.checks import BaseModelError
from lora_core.models.gguf_adapter import write_gguf_adapter

HIDDEN, HEADS, KV_HEADS, HEAD = 24, 6, 2, 4
MODULES = {
    "model.layers.0.self_attn.q_proj": (HEADS * HEAD, HIDDEN, "blk.0.attn_q"),
    "model.layers.1.self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN, "blk.1.attn_k"),
    "model.layers.1.self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN, "blk.1.attn_v"),
    "model.layers.0.self_attn.o_proj": (HIDDEN, HEADS * HEAD, "blk.0.attn_output"),
    "model.layers.0.mlp.gate_proj": (40, HIDDEN, "blk.0.ffn_gate"),
    "model.layers.0.mlp.up_proj": (40, HIDDEN, "blk.0.ffn_up"),
    "model.layers.1.mlp.down_proj": (HIDDEN, 40, "blk.1.ffn_down"),
}


def config(model_type: str) -> SimpleNamespace:
    return SimpleNamespace(
        model_type=model_type, num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS
    )


def adapter() -> Adapter:
    torch.manual_seed(0)
    ranks = {module: 2 + index % 3 for index, module in enumerate(MODULES)}
    return Adapter(
        scale={module: 0.5 + rank for module, rank in ranks.items()},
        a={module: torch.randn(rank, MODULES[module][1]) for module, rank in ranks.items()},
        b={module: torch.randn(MODULES[module][0], rank) for module, rank in ranks.items()},
    )


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_product_is_the_same(tmp_path: Path, model_type: str) -> None:
    written = adapter()
    write_gguf_adapter(config(model_type), written, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    family = model_type if model_type.startswith("qwen") else "llama"
    assert (values["general.architecture"], values["general.type"], values["adapter.type"]) == (
        family, "adapter", "lora"
    )  # fmt: skip
    alpha, tensors = values["adapter.lora.alpha"], {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert len(tensors) == 2 * len(MODULES)
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    for module, (_, _, name) in MODULES.items():
        a, b = tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"]
        whole = alpha / a.shape[0] * b @ a  # what llama.cpp adds to its weight of this name
        if family == "llama":
            whole = torch.tensor(LlamaTensorProcessor(heads).process(whole.numpy(), f"{name}.weight").weights)
        expected = written.scale[module] * written.b[module] @ written.a[module]
        assert torch.allclose(whole, expected, rtol=1e-5, atol=1e-5), module


def test_what_llama_cpp_could_not_add_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"for llama, .* not for gemma; export as tar"):
        write_gguf_adapter(config("gemma"), adapter(), tmp_path / "a.gguf")
    dora = adapter()
    dora.magnitude = {module: torch.ones(rows) for module, (rows, _, _) in MODULES.items()}
    with pytest.raises(BaseModelError, match="no DoRA; export it merged"):
        write_gguf_adapter(config("llama"), dora, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()
