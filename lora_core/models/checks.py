"""What a base model's files say against it, before any weight is read: a quantisation that is not read here, weights
that are missing, a family that cannot run.

The service asks at submission and whoever loads a base asks again, so that both refuse the same with the same words.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    PretrainedConfig,
)

SUPPORTED = "use a Llama, Mistral, Qwen, Gemma or GPT-2 model"
ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What transformers takes the weights from: the first of them that is there."""
OLD_QUANTISED = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Before config.json said so."""


class BaseModelError(ValueError):
    """A base model that cannot be found, read or adapted; the sentence says what to change."""


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, as transformers chooses them: not those of an adapter, or of another form, that
    lie beside them. Empty where there are none; shards that an index names need not exist."""
    named = _json(folder / "config.json").get("transformers_weights")
    first = next((name for name in ([named] if named else WEIGHTS) if (folder / name).is_file()), None)
    return [folder / name for name in _shards(folder, first)]


def refuse_unusable(folder: Path, source: str, listed: Collection[str] | None = None) -> None:
    """See that a model directory can be a base. `listed`: the names of all files of the source, where `folder` holds
    the small ones only; None where it holds them all.

    Raises:
        BaseModelError: everything that is wrong with it.
    """
    here = {path.name for path in folder.iterdir()}
    names = here if listed is None else set(listed)
    if "config.json" not in names:
        raise BaseModelError(f"base model {source}: {_without_config(folder, names)}")
    config = _json(folder / "config.json")
    problems = [*_of_quantisation(config, names), *_of_weights(folder, config, names, listed is None)]
    if problem := _of_family(folder, config):
        problems.append(problem)
    if problems:
        raise BaseModelError(f"base model {source}: {'; '.join(problems)}")


def moving_positions(config: PretrainedConfig) -> str | None:
    """Why documents cannot be packed, if a model's positions depend on what they are packed with."""
    ropes = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = {rope.get("rope_type") for rope in (ropes, *ropes.values()) if isinstance(rope, dict)}
    if by_longest := kinds & {"dynamic", "longrope"}:
        return (
            f"its positions ({by_longest.pop()} RoPE) depend on the longest document in a batch, so that jobs would"
            " change each other; use a model with another rope_type"
        )
    return None


def _without_config(folder: Path, names: Collection[str]) -> str:
    if ADAPTER_CONFIG in names:
        base = _json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "the model that it was trained on"
        return f"this is a PEFT adapter; give its base ({base}) as base_model and the adapter as init_adapter"
    if any(name.endswith(".gguf") for name in names):
        return "there is no config.json but a GGUF file; give the path of that file"
    return "the directory has no config.json; point to a Hugging Face model directory"


def _of_quantisation(config: dict[str, Any], names: Collection[str]) -> list[str]:
    found = [
        part.get(name)
        for part in (config, config.get("text_config") or {})
        for name in ("quantization_config", "compression_config")
    ]
    methods = [str(one.get("quant_method") or "of an unnamed kind") for one in found if isinstance(one, dict)]
    methods += [method for name, method in OLD_QUANTISED.items() if name in names]
    # transformers leaves "gguf" behind where it has read such a file; then the weights are dense.
    return [
        f"its weights are quantised ({method}), which is not read here; use the model from which they were made, with"
        " precision nf4 or fp8 where memory is short"
        for method in dict.fromkeys(methods)
        if method != "gguf"
    ][:1]


def _of_weights(folder: Path, config: dict[str, Any], names: Collection[str], complete: bool) -> list[str]:
    named = config.get("transformers_weights")
    first = next((name for name in ([named] if named else WEIGHTS) if name in names), None)
    if first is None:
        adapter = ", only those of an adapter" if ADAPTER_CONFIG in names else ""
        return [f"it holds no *.safetensors with the model's weights{adapter}; save the model with save_pretrained"]
    if first.endswith(".index.json") and not (folder / first).is_file():
        return []  # a large model's index that was not fetched: its shards are seen when it is loaded
    shards = _shards(folder, first)
    if missing := [name for name in shards if name not in names]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return [f"{missing[0]}{more}, of which {first} speaks, is not there; fetch or copy the model again"]
    if complete and (
        broken := [name for name in shards if name.endswith(".safetensors") and not _opens(folder / name)]
    ):
        return [
            f"{broken[0]} is no whole safetensors file; fetch or copy the model again (git lfs pull, after a clone)"
        ]
    return []


def _of_family(folder: Path, config: dict[str, Any]) -> str | None:
    family = config.get("model_type")
    if family not in CONFIG_MAPPING:
        if config.get("auto_map"):
            return f"it needs Python code of its own (auto_map), which is not run here; {SUPPORTED}"
        return f"its family ({family}) is not known; {SUPPORTED}"
    try:
        loaded = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tied = loaded.get_text_config().tie_word_embeddings
    except Exception as error:  # what transformers raises about a config that it cannot use comes in many types
        return f"its config.json cannot be used ({' '.join(str(error).split())[:300]})"
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(loaded), None)
    encoder = type(loaded) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(loaded, "is_decoder", False)
    if model is None or encoder:
        return f"its family ({family}) is none of causal language models; {SUPPORTED}"
    if not model._supports_attention_backend:
        return f"its family ({family}) computes attention in a way that is not supported here; {SUPPORTED}"
    # A decoder that was saved without its head has all of its weights where the head is the embedding.
    headless: Any = MODEL_MAPPING.get(type(loaded), None) if tied else None
    saved = config.get("architectures") or [model.__name__]
    if not {getattr(one, "__name__", None) for one in (model, headless)} & set(saved):
        return f"it was saved as {saved[0]}, and is no causal language model ({model.__name__}); {SUPPORTED}"
    return moving_positions(loaded)


def _shards(folder: Path, first: str | None) -> list[str]:
    if first is None or not first.endswith(".index.json"):
        return [] if first is None else [first]
    return sorted({str(name) for name in _json(folder / first).get("weight_map", {}).values()})


def _opens(file: Path) -> bool:
    """Whether its header can be read, and its length is what the header says: not so for half a download, or what Git
    LFS leaves in its place."""
    try:
        with safe_open(file, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(f"base model {file.parent}: {file.name} cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise BaseModelError(f"base model {file.parent}: {file.name} holds no options")
    return values
