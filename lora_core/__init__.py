"""The mathematics of training and serving many LoRA adapters on one frozen base, and a library of its own:

    base = lora_core.load_base("smollm2.gguf", precision="fp32")
    results = lora_core.train(base, [lora_core.TrainJob(name="a", dataset="a.jsonl")], out="adapters/")

These names are looked up at their first use, so that `import lora_core.config` stays free of torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "LoraConfig": "config",
    "TrainConfig": "config",
    "load_base": "models.base",
    "TrainJob": "library",
    "TrainJobsError": "library",
    "TrainResult": "library",
    "train": "library",
    "write_merged": "models.merge",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
