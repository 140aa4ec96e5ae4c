"""An adapter on disk, exactly as PEFT and vLLM read it: `adapter_config.json` and `adapter_model.safetensors`.

Keys are `base_model.model.<module>.lora_A.weight` `[r, in]` and `.lora_B.weight` `[out, r]`, for GPT-2's `Conv1D` too,
and with DoRA `.lora_magnitude_vector` `[out]` (PEFT 0.21, `peft/utils/save_and_load.py`). The published form has each
module's scale folded into B, zeros up to the largest rank, and says `lora_alpha = r`, so that every reader computes the
same whatever it makes of rsLoRA or patterns (vLLM ignores them); the unfolded fp32 master stays in the checkpoint. A
residual (PiSSA) becomes further ranks, as in PEFT's conversion: `s B A - s B0 A0 = [s B, -s B0] [A; A0]`, which belongs
to the base as it is.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.dora import weight_of
from lora_core.adapters.targets import AdaptableModules, layer_of
from lora_core.config import RanksAndScales

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_Part = Literal["A", "B", "magnitude"]
_SUFFIXES: dict[_Part, str] = {"A": ".lora_A.weight", "B": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
_UNREADABLE = (
    "alora_invocation_tokens",
    "arrow_config",
    "exclude_modules",
    "kasa_config",
    "layer_replication",
    "layers_pattern",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Fields that change what the weights mean or where they go."""

_KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ) belong to a
changed one.
"""


class _PeftConfig(RanksAndScales):
    """What is read of `adapter_config.json`."""

    peft_type: Literal["LORA"]
    target_modules: str | list[str]
    layers_to_transform: int | list[int] | None = None
    use_dora: bool = False
    bias: Literal["none"] = "none"

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _null_is_no_pattern(cls, pattern: object) -> object:
        return {} if pattern is None else pattern


class AdapterFormatError(ValueError):
    """Adapter files that cannot be loaded onto this base without guessing."""


def adapter_files(adapter: Adapter, adaptable: AdaptableModules, base_name: str) -> dict[str, bytes]:
    """Make the two files of a published adapter. Equal weights give equal bytes, so their digest names the content."""
    folded = {module: adapter.folded(module) for module in sorted(adapter.a)}
    r = max(a.shape[0] for a, _ in folded.values())
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in folded.items():
        missing = r - a.shape[0]
        tensors[_PREFIX + module + _SUFFIXES["A"]] = pad(a, (0, 0, 0, missing)).float().cpu().contiguous()
        tensors[_PREFIX + module + _SUFFIXES["B"]] = pad(b, (0, missing)).float().cpu().contiguous()
    for module, m in adapter.magnitude.items():
        tensors[_PREFIX + module + _SUFFIXES["magnitude"]] = m.detach().float().cpu()
    config: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(adaptable.modules[module], Conv1D) for module in adapter.a),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": r,
        "lora_dropout": adapter.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": _target_list(adapter, adaptable),
        "task_type": "CAUSAL_LM",
        "use_dora": bool(adapter.magnitude),
        "use_rslora": False,
    }
    return {
        CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True).encode(),
        WEIGHTS_FILE: save(tensors, {"format": "pt"}),
    }


def read_adapter(folder: Path, adaptable: AdaptableModules, name: str | None = None) -> Adapter:
    """Read PEFT files strictly: every key is used, every module exists, every shape fits. What is raised calls them
    `name`, or as their folder is called.

    Returns an adapter without gradients, ranks and scales as the config says (1 for what this project published); its
    weights in fp32 are the file's own, mapped.

    Raises:
        AdapterFormatError: all that does not fit, in one sentence each; or caused by an OSError, that they cannot be
            read.
    """
    name = name or folder.name
    try:
        raw = json.loads((folder / CONFIG_FILE).read_bytes())
        tensors = load_file(folder / WEIGHTS_FILE)
        config = _PeftConfig.model_validate(raw)
    except ValidationError as error:
        fields = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
        raise AdapterFormatError(f"{name}: {CONFIG_FILE} does not fit ({fields})") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterFormatError(f"{name}: not a readable PEFT adapter ({error})") from error
    problems = _unsupported(raw)
    parts: dict[_Part, dict[str, Tensor]] = {"A": {}, "B": {}, "magnitude": {}}
    shapes = adaptable.shapes
    for key, tensor in tensors.items():
        module, part = _split_key(key)
        if part is None or module not in shapes:
            problems += _base_weight_problems(key, tensor, adaptable)
            continue
        (fan_in, fan_out), r = shapes[module], config.rank_of(module)
        if tuple(tensor.shape) != {"A": (r, fan_in), "B": (fan_out, r), "magnitude": (fan_out,)}[part]:
            problems.append(f"{key} has shape {list(tensor.shape)}, which does not fit r={r}, {fan_in} -> {fan_out}")
        elif not tensor.is_floating_point():
            problems.append(f"{key} is {tensor.dtype}, not a floating-point tensor")
        elif not torch.stack(tensor.aminmax()).isfinite().all():  # a fifth of the time of asking each
            problems.append(f"{key} has numbers that are not finite")
        else:
            parts[part][module] = tensor.float()
    a, b, magnitude = parts["A"], parts["B"], parts["magnitude"]
    problems += [f"{module} has only one of lora_A and lora_B" for module in sorted(a.keys() ^ b.keys())]
    problems += [
        f"{module} has a lora_magnitude_vector, which only use_dora and a lora_A give a meaning"
        for module in sorted(magnitude.keys() - (a.keys() if config.use_dora else set()))
    ]
    if config.use_dora:
        problems += [f"{module} has no lora_magnitude_vector" for module in sorted(a.keys() - magnitude.keys())]
    problems += [f"{module} is a target without weights" for module in _targets(config, adaptable) if module not in a]
    problems += ["it holds no weights"] if not tensors else []
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise AdapterFormatError(f"{name}: {shown}")
    order = [module for module in adaptable.modules if module in a]
    scale = {module: config.scale_of(module) for module in order}
    parts = {
        part: {module: of_part[module] for module in order if module in of_part} for part, of_part in parts.items()
    }
    adapter = Adapter(scale, parts["A"], parts["B"], magnitude=parts["magnitude"])
    adaptable.add_norms(adapter, order)
    return adapter


def _unsupported(config: dict[str, Any]) -> list[str]:
    problems = [f"{field} is set, which is not supported" for field in _UNREADABLE if config.get(field)]
    if config.get("init_lora_weights", True) not in _KEEPS_BASE:
        problems.append(
            f"init_lora_weights is {config['init_lora_weights']}, so it belongs to a changed base: convert it to LoRA"
        )
    return problems


def _split_key(key: str) -> tuple[str, _Part | None]:
    for part, suffix in _SUFFIXES.items():
        if key.startswith(_PREFIX) and key.endswith(suffix):
            return key[len(_PREFIX) : -len(suffix)], part
    return key, None


def _base_weight_problems(key: str, tensor: Tensor, adaptable: AdaptableModules) -> list[str]:
    """Compare the base's own weight of an adapted output head, which PEFT saves along, with the one here."""
    module = key.removeprefix(_PREFIX).removesuffix(".base_layer.weight")
    if key != f"{_PREFIX}{module}.base_layer.weight" or module not in adaptable.modules:
        return [f"{key} belongs to no linear of this base model"]
    own = weight_of(adaptable.modules[module])
    if own.shape == tensor.shape and (own.is_meta or torch.equal(own, tensor.to(own.device, own.dtype))):
        return []  # a base without weights, on which jobs are checked, can only be compared by shape
    return [f"{key} is another weight than this base model has there"]


def _target_list(adapter: Adapter, adaptable: AdaptableModules) -> list[str]:
    """Return leaf names where they select exactly the adapted modules (vLLM wants those), else full names; sorted."""
    leaves = sorted({module.rpartition(".")[2] for module in adapter.a})
    return leaves if set(adaptable.select(leaves)) == set(adapter.a) else sorted(adapter.a)


def _targets(config: _PeftConfig, adaptable: AdaptableModules) -> list[str]:
    """Return the modules that the config names. PEFT allows an entry that names none, since a list may serve several
    families. Layers count for a list's entries that are no module's whole name (PEFT, `check_target_module_exists`).
    """
    named, layers = config.target_modules, config.layers_to_transform
    chosen: set[str] = set()
    for entry in [named] if isinstance(named, str) else [[name] for name in named]:
        with contextlib.suppress(ValueError):
            chosen.update(adaptable.select(entry))
    if layers not in (None, []) and not isinstance(named, str):
        wanted = [layers] if isinstance(layers, int) else layers
        chosen = {module for module in chosen if module in named or layer_of(module) in wanted}
    return [module for module in adaptable.modules if module in chosen]
